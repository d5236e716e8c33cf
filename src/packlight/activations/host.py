"""The host tier: a GPU's activations in pinned host memory, copied on a side stream while compute goes on.

torch's `save_on_cpu` copies on the compute stream, and pins new memory for each tensor. With a side stream alone the
copies may lag, and the tensors that they read then fill the device: offloading everything was measured to need more
memory than no offloading (axolotl#3776). The idea: what is being copied is bounded, and where it would exceed the
bound, compute waits for the oldest copy.

```
put     1 at the bound: the oldest copies' streams wait for them, their tensors are dropped
        2 slot reserved   3 copy queued on the side stream   4 tensor kept until its copy is done, or step 1
get     5 result allocated on the present stream   6 copy back queued on the side stream
        7 the present stream waits for the copy; the host does not
```

Why compute waits, and not the host (step 1): memory is bounded when the allocator may hand it out again, and that is
when the host drops the tensor. Once the compute stream has been told to wait for the copy, the tensor can be dropped
at once: whoever gets its memory works behind that wait. If the host waited instead, the bound would be the same, but
the host could no longer run ahead of the device; and if nobody waited, `is_done` would find nearly every copy undone,
just because the host is early. `copies.py` draws the order of the streams.

For the same reason, only those copies are late for which compute has come past step 3: they wait for the link alone.
Where these fill the bound, and the tier is told to keep what is late, a tensor stays on the device instead of step 1.
"""

import os
import weakref
from collections import deque
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from packlight.activations.copies import Copier, Copy, make_copier
from packlight.activations.shelf import Late, OnFull, Shelf
from packlight.activations.slabs import Slabs, Slot
from packlight.activations.tier import Arrival, OffloadError, Record, Stopwatch


class HostTier(Shelf[Slot]):
    """Stores tensors of one device in host memory.

    For a CPU device, as in tests, the copies run at once and the memory is not pinned.
    """

    name = "host"

    def __init__(
        self,
        *,
        device: torch.device,
        max_bytes: int | None = None,
        max_in_flight_bytes: int = 256 * 2**20,
        on_full: OnFull = "raise",
        late: Late = "wait",
        keep_bytes: int | None = None,
        copier: Copier | None = None,
    ) -> None:
        """Start without memory.

        Args:
            device: where the tensors live.
            max_bytes: bound on the host memory taken; None for no bound.
            max_in_flight_bytes: bound on the device memory of what is being copied out, and again on that of what was
                brought back ahead of time.
            on_full: "raise" raises from `put`; "keep" warns once and leaves tensors on the device.
            late: "wait" makes compute wait where a tensor would exceed the bound; "keep" leaves the tensor on the
                device if the link is what others wait for.
            keep_bytes: bound on what is left there for being late, above which compute waits; None for
                `max_in_flight_bytes`.
            copier: what copies; None for the device's own.

        Raises:
            ValueError: a bound that nothing can move under.
        """
        super().__init__(
            device=device,
            max_in_flight_bytes=max_in_flight_bytes,
            on_full=on_full,
            late=late,
            keep_bytes=keep_bytes,
        )
        self._copier = make_copier(self.device) if copier is None else copier
        self._slabs = Slabs(self.device, max_bytes=max_bytes)
        self._max_bytes = max_bytes
        self._moving: deque[tuple[Record[Slot], Copy]] = deque()
        self._untimed: deque[tuple[Copy, int, Stopwatch]] = deque()
        self._shut = weakref.finalize(self, _shut, self._copier, self._slabs, self._pid)

    def drain(self) -> None:
        """Drop every tensor that is being copied (step 1): compute waits; off the default stream, the host."""
        if not self._moving:
            return
        self._check_caller()
        with self._changed:
            self._begin_call()
            self._make_room(self.max_in_flight_bytes)

    def close(self) -> None:
        """Wait for the copies, and give the host memory up."""
        if self._pid != os.getpid():
            return
        with self._changed:
            if self._closed:
                return
            self._check_caller()
            self._make_room(0)
            self._closed = True
            self._shut()

    # What Shelf asks for

    def _make_room(self, num_bytes: int) -> None:
        room_bytes = max(self.max_in_flight_bytes - num_bytes, 0) if num_bytes else 0
        while self._in_flight_bytes > room_bytes:
            record, copy = self._moving.popleft()
            if num_bytes:
                copy.settle()  # step 1
            else:
                copy.wait()
            self._moved(record)

    def _let_go(self, record: Record[Slot]) -> None:
        while record.source is not None:
            first, copy = self._moving.popleft()
            copy.settle()  # step 1
            self._moved(first)

    def _reap(self) -> None:
        """Drop the tensors whose copies are done, and note how long copies took."""
        while self._moving and self._moving[0][1].is_done():
            self._moved(self._moving.popleft()[0])
        while self._untimed and self._untimed[0][0].is_done():
            copy, num_bytes, stopwatch = self._untimed.popleft()
            stopwatch.add(num_bytes, copy.seconds())

    def _late_bytes(self) -> int:
        waiting = takewhile(lambda each: each[0].is_ready(), self._untimed)
        return sum(num_bytes for copy, num_bytes, stopwatch in waiting if stopwatch is self._out and not copy.is_done())

    def _reserve(self, num_bytes: int) -> Slot | None:
        if self._slabs.is_wasteful:
            self._copier.wait()  # a slot may be free while its last copy runs
            self._slabs.fit()
        slot = self._slabs.allocate(num_bytes)
        if slot is None and self._slabs.finds_room_in_unused(num_bytes):
            self._copier.wait()
            self._slabs.drop_unused()  # the sizes of an earlier step, which had other shapes
            slot = self._slabs.allocate(num_bytes)
        return slot

    def _release(self, place: Slot) -> None:
        self._slabs.release(place)

    def _stored_bytes(self) -> int:
        return self._slabs.used_bytes

    def _pinned_bytes(self) -> int:
        return self._slabs.taken_bytes

    def _full(self, wanted_bytes: int) -> OffloadError:
        return OffloadError(
            f"the host tier is full: {wanted_bytes} bytes were to be stored, {self._slabs.used_bytes} are, in "
            f"{self._slabs.num_bytes} bytes of host memory, of {self._max_bytes} allowed; raise max_bytes, offload "
            'less, or use tier="disk"'
        )

    def _send(self, record: Record[Slot], place: Slot) -> None:
        assert record.source is not None
        copy = self._copier.copy(place.memory(record.num_bytes), record.source.view(torch.uint8))  # step 3
        self._moving.append((record, copy))  # step 4
        self._untimed.append((copy, record.num_bytes, self._out))

    def _bring(self, record: Record[Slot], place: Slot) -> Arrival:
        result = torch.empty(record.numel, dtype=record.dtype, device=self.device)  # step 5
        copy = self._copier.copy(result.view(torch.uint8), place.memory(record.num_bytes))  # step 6
        self._untimed.append((copy, record.num_bytes, self._in))
        return _Landing(result, copy)


@dataclass
class _Landing:
    """A tensor that is being copied back."""

    result: Tensor
    copy: Copy

    def take(self) -> Tensor:
        return self.copy.lend(self.result)  # step 7

    def abandon(self) -> None:
        self.copy.order()  # its memory goes back to the stream that it was allocated on


def _shut(copier: Copier, slabs: Slabs, pid: int) -> None:
    """Give the slabs up behind the last copy; it also runs when the tier is collected."""
    if pid == os.getpid():  # a forked child may not call CUDA
        copier.wait()
        slabs.close()
