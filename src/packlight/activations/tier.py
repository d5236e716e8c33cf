"""What a tier is: a place outside the device where a tensor's bytes wait until backward asks for them.

torch's `save_on_cpu` copies while compute waits, and can neither say how much it stores nor bring anything back ahead
of time. The interface here is what the engine needs: begin to move out and return, bring back ahead of time within a
bound, know the bytes and the bandwidth, and never hand out bytes other than those that were put.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from packlight.activations.copies import Moment

Place = TypeVar("Place")


class OffloadError(RuntimeError):
    """A tier is full, failed or closed; the message names it, the bytes, and what to try."""


@dataclass(frozen=True)
class Traffic:
    """What a tier has moved since it was made."""

    bytes_out: int
    """Bytes moved to the tier."""
    bytes_in: int
    """Bytes brought back."""
    seconds_out: float
    """Seconds in which at least one tensor was being written; bytes_out / seconds_out is the bandwidth."""
    seconds_in: float
    """The same for bringing back."""
    stored_bytes: int
    """Bytes taken on the tier now, alignment included."""
    most_stored_bytes: int
    """The most that this ever was."""
    pinned_bytes: int = 0
    """Host memory that the tier has taken for its copies now, pinned where the tensors live on a GPU."""
    kept_bytes: int = 0
    """Bytes of tensors that are left on the device now: the tier was full or failed, or its copies were late."""
    most_kept_bytes: int = 0
    """The most that this ever was."""


class Stored(Protocol):
    """One tensor on a tier; its bytes are given up by `free()` or when nothing refers to it."""

    @property
    def num_bytes(self) -> int:
        """The tensor's bytes."""

    def get(self) -> Tensor:
        """Return the bytes that were put: a new 1-D tensor of the same dtype, on the original device.

        May be called several times and from any thread.

        Raises:
            OffloadError: the tier is closed, or the bytes cannot be read, or are not those that were written.
            RuntimeError: the tensor was modified in place since it was put.
        """

    def prefetch(self) -> bool:
        """Begin to bring the tensor back for the next `get()`; False if too much is on its way already."""

    def drain(self) -> None:
        """Give back the memory of what was put; whoever uses it next waits for the move, or this does.

        Raises:
            OffloadError: the tier is closed, or the bytes could not be moved.
        """

    def free(self) -> None:
        """Give up the bytes; calling it again does nothing."""


class Tier(Protocol):
    """A place for tensors of one device. Every method may be called from any thread."""

    name: str
    """host or disk."""

    def put(self, flat: Tensor) -> Stored:
        """Begin to move a tensor out, and return; wait first while more than the bound is still being moved.

        Args:
            flat: any dtype, 1-D, contiguous, detached, on the tier's device. It is kept until it has been moved;
                nobody may write to it before.

        Returns:
            What brings it back.

        Raises:
            OffloadError: the tier is full, failed or closed.
        """

    def flush(self) -> None:
        """Wait until everything that was put has been moved."""

    def drain(self) -> None:
        """Give back the memory of everything that was put; whoever uses it next waits for the moves, or this does."""

    def close(self) -> None:
        """Give up everything stored, the threads and the memory; calling it again does nothing."""

    def traffic(self) -> Traffic:
        """Return what was moved so far."""


class Arrival(Protocol):
    """A tensor on its way back to the device."""

    def take(self) -> Tensor:
        """Wait for it, or make the present stream wait, and return it."""

    def abandon(self) -> None:
        """Make sure that its memory is not given to somebody else while bytes still arrive in it."""


class Witness:
    """Tells whether a tensor was modified in place, without keeping its memory.

    An alias shares the tensor's version counter; with its data replaced by nothing it holds no bytes. The version is
    compared when the bytes are needed, as autograd does, and not when the copy ends: an operation raises the version
    after it has written, so a copy that ends in between would look clean.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Note the tensor's version."""
        self._shape = list(tensor.shape)
        self._alias: Tensor | None = None
        if not tensor.is_inference():  # those have no version
            self._alias = tensor.detach()
            self._alias.data = tensor.new_empty(0)
            self._version = self._alias._version

    def check(self) -> None:
        """Raise what autograd raises if the tensor has been modified since."""
        if self._alias is not None and self._alias._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self._alias.type()} {self._shape}], which was offloaded, is at version {self._alias._version}; "
                f"expected version {self._version} instead. Hint: clone it before the operation, or use one that is "
                "not in place"
            )


@dataclass(eq=False)
class Record(Generic[Place]):
    """What a tier knows of one stored tensor; guarded by the tier's lock."""

    num_bytes: int
    numel: int
    dtype: torch.dtype
    witness: Witness
    made: Moment | None
    """When the tensor was put."""
    source: Tensor | None
    """The tensor itself: until it is moved, or for good where it could not be."""
    place: Place | None = None
    """Where its bytes lie; None for an empty tensor and for one that was kept."""
    busy: int = 0
    """Copies that use the place now."""
    kept: bool = False
    """Whether the source stays for good."""
    freed: bool = False
    ahead: "Arrival | None" = None
    """What `prefetch` began."""
    checksums: list[int] = field(default_factory=list)
    """Of each chunk, where a tier takes them."""


class Owner(Protocol[Place]):
    """A tier, as the handles of its tensors see it."""

    def fetch(self, record: Record[Place]) -> Tensor:
        """See `Stored.get`."""

    def fetch_ahead(self, record: Record[Place]) -> bool:
        """See `Stored.prefetch`."""

    def leave(self, record: Record[Place]) -> None:
        """See `Stored.drain`."""

    def drop(self, record: Record[Place]) -> None:
        """See `Stored.free`."""


class Handle(Generic[Place]):
    """What `put` returns: a `Stored`."""

    def __init__(self, owner: Owner[Place], record: Record[Place]) -> None:
        """Keep the tier alive as long as somebody may ask for the tensor."""
        self._owner, self._record = owner, record
        self.num_bytes = record.num_bytes

    def get(self) -> Tensor:
        """Return the tensor."""
        return self._owner.fetch(self._record)

    def prefetch(self) -> bool:
        """Begin to bring it back, if the window allows."""
        return self._owner.fetch_ahead(self._record)

    def drain(self) -> None:
        """Give its memory back."""
        self._owner.leave(self._record)

    def free(self) -> None:
        """Give its bytes up."""
        self._owner.drop(self._record)

    def __del__(self) -> None:
        self.free()


class Stopwatch:
    """Counts bytes, and the seconds in which at least one copy was running; threads may overlap."""

    def __init__(self) -> None:
        """Start at zero."""
        self.num_bytes, self.seconds = 0, 0.0
        self._lock = threading.Lock()
        self._running, self._since = 0, 0.0

    @contextmanager
    def timing(self, num_bytes: int) -> Iterator[None]:
        """Time a copy that ends with the block; one that fails adds its time and no bytes."""
        with self._lock:
            self._since = time.perf_counter() if not self._running else self._since
            self._running += 1
        try:
            yield
            self.add(num_bytes, 0.0)
        finally:
            with self._lock:
                self._running -= 1
                self.seconds += 0.0 if self._running else time.perf_counter() - self._since

    def add(self, num_bytes: int, seconds: float) -> None:
        """Add a copy that was timed elsewhere."""
        with self._lock:
            self.num_bytes += num_bytes
            self.seconds += seconds


@dataclass
class Taken:
    """An arrival that needs no waiting: a function that makes the tensor."""

    make: Callable[[], Tensor]

    def take(self) -> Tensor:
        """Make it."""
        return self.make()

    def abandon(self) -> None:
        """Nothing is on its way."""


def check_flat(flat: Tensor, device: torch.device) -> None:
    """Refuse what a tier cannot store as plain bytes.

    Raises:
        ValueError: anything but a 1-D, contiguous, detached, plain tensor on `device`.
    """
    reasons = [
        (type(flat) is not Tensor, "not a plain tensor"),
        (flat.dim() != 1 or not flat.is_contiguous(), "not 1-D and contiguous"),
        (flat.requires_grad, "not detached"),
        (flat.is_conj() or flat.is_neg(), "a lazy conjugate or negative"),
        (flat.device != device, f"on {flat.device} and not on {device}"),
    ]
    for wrong, reason in reasons:
        if wrong:
            raise ValueError(f"cannot offload a tensor that is {reason}; put a plain, flat, detached copy of it")


def check_options(*, max_in_flight_bytes: int, on_full: str, late: str, keep_bytes: int | None) -> None:
    """Refuse options that a tier cannot work with.

    Raises:
        ValueError: a bound that nothing can move under, or an unknown word.
    """
    if max_in_flight_bytes < 1:
        raise ValueError(f"max_in_flight_bytes is {max_in_flight_bytes}; at least one byte must be able to move")
    if on_full not in {"raise", "keep"}:
        raise ValueError(f'on_full is {on_full!r}; it is "raise" or "keep"')
    if late not in {"wait", "keep", "steady"}:
        raise ValueError(f'late is {late!r}; it is "wait", "keep" or, for a disk, "steady"')
    if late != "keep" and keep_bytes is not None:
        raise ValueError(f'keep_bytes is {keep_bytes}, but nothing is kept; leave it out, or pass late="keep"')
