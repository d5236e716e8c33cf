"""Which bytes of a file or of a slab of memory are in use, and which may be given out next.

A step stores and frees the same sizes over and over; without reuse a file would grow by a step's activations every
step. torch's pinned allocator does reuse, but rounds up to powers of two (2.25 GiB take 4 GiB). The idea: the free
ranges are kept in order of their start; a request gets the first that is long enough, which fills low addresses
before the file grows, and a range that comes back is joined with free neighbours. Nothing here touches the bytes.

Source: first fit with coalescing, Knuth, The Art of Computer Programming, volume 1, section 2.5.
"""

from bisect import bisect_left
from typing import NamedTuple

UNBOUNDED_BYTES = 2**62
"""The capacity where nobody set one; below the largest offset that a file system call takes."""


class Extent(NamedTuple):
    """A range of bytes that is in use; both numbers are multiples of the alignment."""

    start: int
    num_bytes: int

    @property
    def stop(self) -> int:
        """The offset of the first byte behind it."""
        return self.start + self.num_bytes


def round_up(num_bytes: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is not below `num_bytes`."""
    return -(-num_bytes // alignment) * alignment


class Extents:
    """Hands out ranges of [0, capacity) and takes them back; it does no locking.

    >>> extents = Extents(3 * 4096, alignment=4096)
    >>> first, second = extents.allocate(5000), extents.allocate(1)
    >>> first, second, extents.allocate(1)
    (Extent(start=0, num_bytes=8192), Extent(start=8192, num_bytes=4096), None)
    >>> extents.release(first)
    >>> extents.allocate(4096), extents.used_bytes
    (Extent(start=0, num_bytes=4096), 8192)
    """

    def __init__(self, capacity_bytes: int | None = None, *, alignment: int) -> None:
        """Start with everything free.

        Args:
            capacity_bytes: where the last range ends at the latest; None for no bound.
            alignment: of every start and every length, in bytes.
        """
        capacity_bytes = UNBOUNDED_BYTES if capacity_bytes is None else capacity_bytes
        self._alignment = alignment
        self._free = [Extent(0, capacity_bytes // alignment * alignment)]
        self.used_bytes = 0
        self.end = 0
        """The highest `stop` that was ever given out: the size of the file."""

    def allocate(self, num_bytes: int) -> Extent | None:
        """Return the first range of at least `num_bytes` > 0 bytes, or None where no free range is long enough."""
        assert num_bytes > 0, num_bytes
        wanted_bytes = round_up(num_bytes, self._alignment)
        for at, free in enumerate(self._free):
            if free.num_bytes >= wanted_bytes:
                rest = Extent(free.start + wanted_bytes, free.num_bytes - wanted_bytes)
                self._free[at : at + 1] = [rest] if rest.num_bytes else []
                self.used_bytes += wanted_bytes
                self.end = max(self.end, rest.start)
                return Extent(free.start, wanted_bytes)
        return None

    def release(self, extent: Extent) -> None:
        """Take back a range that `allocate` gave out, once."""
        at = bisect_left(self._free, extent)
        before = self._free[at - 1 : at] if at else []
        after = self._free[at : at + 1]
        assert all(free.stop <= extent.start for free in before), f"{extent} is free already"
        assert all(extent.stop <= free.start for free in after), f"{extent} is free already"
        joined = [free for free in before if free.stop == extent.start]
        joined += [extent, *(free for free in after if free.start == extent.stop)]
        first = at - (joined[0] is not extent)
        self._free[first : first + len(joined) - 1] = [Extent(joined[0].start, sum(each.num_bytes for each in joined))]
        self.used_bytes -= extent.num_bytes

    @property
    def largest_free_bytes(self) -> int:
        """The longest request that would be met now, in bytes."""
        return max((free.num_bytes for free in self._free), default=0)
