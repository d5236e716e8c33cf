"""What the host tier and the disk tier have in common: who holds which bytes, and how many are on their way.

The two differ in how bytes move (a copy stream, threads) and where they lie (slabs, a file). The rest is here once: a
tensor is referenced until it has been moved; its place is reused when nobody can ask for it and no copy uses it; what
is being moved, and what was brought back ahead of time, is bounded; a tier that is full says so or keeps the tensor;
one that is late waits, or keeps the tensor as long as what it keeps is bounded, too.

```
put     1 wait until it fits the window, or keep the source
        2 reserve a place   3 send                                           (source set, busy 1, in flight)
moved   4 drop the source, busy 0, no longer in flight; where it failed, keep the source and give the place up
get     5 from the source if that is still here, else bring it back from the place
free    6 note it; whoever holds the lock next gives up the places that no copy uses, the others follow at step 4
```

Step 6 is split because Python may collect a tensor's handle anywhere, also inside a call that holds the lock.
"""

import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import Generic, Literal

import torch
from torch import Tensor

from packlight.activations.copies import clone, is_capturing, moment
from packlight.activations.tier import (
    Arrival,
    Handle,
    OffloadError,
    Place,
    Record,
    Stopwatch,
    Stored,
    Taken,
    Traffic,
    Witness,
    check_flat,
    check_options,
)

OnFull = Literal["raise", "keep"]
Late = Literal["wait", "keep", "steady"]


class Shelf(ABC, Generic[Place]):
    """A tier without the moving."""

    name: str

    def __init__(
        self,
        *,
        device: torch.device,
        max_in_flight_bytes: int,
        on_full: OnFull,
        late: Late,
        keep_bytes: int | None,
    ) -> None:
        """Start with nothing stored.

        Args:
            device: where the tensors live.
            max_in_flight_bytes: bound on what is being moved out, and again on what was brought back ahead of time.
            on_full: what happens to a tensor that finds no room: an error, or it stays where it is.
            late: what happens to a tensor that would exceed the bound: it waits for others, or it stays where it is.
            keep_bytes: bound on what stays because of that, on top of what moves; None for `max_in_flight_bytes`.

        Raises:
            ValueError: a bound that nothing can move under, or another word for `on_full` or `late`.
        """
        check_options(max_in_flight_bytes=max_in_flight_bytes, on_full=on_full, late=late, keep_bytes=keep_bytes)
        self._keep_bytes = 0 if late != "keep" else max_in_flight_bytes if keep_bytes is None else keep_bytes
        self.device = torch.empty(0, device=device).device  # with its index
        self.max_in_flight_bytes = max_in_flight_bytes
        self._on_full, self._warned = on_full, False
        self._failure: OffloadError | None = None
        self._pid, self._closed = os.getpid(), False
        self._changed = threading.Condition(threading.Lock())
        self._in_flight_bytes = self._ahead_bytes = 0
        self._most_stored_bytes = self._kept_bytes = self._most_kept_bytes = 0
        self._dropped: deque[Record[Place]] = deque()
        self._leaving: set[Record[Place]] = set()  # freed, but a copy uses their places
        self._out, self._in = Stopwatch(), Stopwatch()

    # What a tier does its own way, called under the lock

    @abstractmethod
    def _make_room(self, num_bytes: int) -> None:
        """Wait until `num_bytes` more may be in flight (step 1); 0 means: until nothing is."""

    @abstractmethod
    def _let_go(self, record: Record[Place]) -> None:
        """See to it that a tensor has been moved or is kept, as those that were put before it."""

    @abstractmethod
    def _reap(self) -> None:
        """Take note of copies that have ended meanwhile, where nobody else does."""

    @abstractmethod
    def _reserve(self, num_bytes: int) -> Place | None:
        """Return a place, or None where there is none (step 2)."""

    @abstractmethod
    def _release(self, place: Place) -> None:
        """Take a place back that no copy uses."""

    @abstractmethod
    def _send(self, record: Record[Place], place: Place) -> None:
        """Begin to move a tensor, `record.source`, to its place (step 3), and see to it that `_moved` is called."""

    @abstractmethod
    def _bring(self, record: Record[Place], place: Place) -> Arrival:
        """Begin to bring a tensor back from its place (step 5)."""

    @abstractmethod
    def _stored_bytes(self) -> int:
        """Return the bytes that are taken now."""

    @abstractmethod
    def _pinned_bytes(self) -> int:
        """Return the host memory that is taken for copies now."""

    def _late_bytes(self) -> int:
        """Return the bytes in flight for which the device waits, or soon will."""
        return self._in_flight_bytes

    @abstractmethod
    def _full(self, wanted_bytes: int) -> OffloadError:
        """Return the error for a tensor that found no place."""

    # What the engine calls

    def put(self, flat: Tensor) -> Stored:
        """Begin to move a tensor out; see `Tier.put`."""
        check_flat(flat, self.device)
        self._check_caller()
        with self._changed:
            self._begin_call()
            source = flat if flat.nbytes else flat.new_empty(0)  # an empty one may be a view of much memory
            made = moment(self.device)
            record: Record[Place] = Record(flat.nbytes, flat.numel(), flat.dtype, Witness(flat), made, source)
            if self._is_late_for(record.num_bytes):
                self._keep(record)
            elif record.num_bytes:
                self._make_room(record.num_bytes)
                self._begin_call()  # the wait may have seen a failure, or the end
                self._place(record)
        return Handle(self, record)

    def fetch(self, record: Record[Place]) -> Tensor:
        """Return a stored tensor; see `Stored.get`."""
        self._check_caller()
        with self._changed:
            self._begin_call(record)
            arrival, record.ahead = record.ahead, None
            if arrival is None:
                arrival = self._begin_fetch(record)
            else:
                self._ahead_bytes -= record.num_bytes
        tensor = arrival.take()
        record.witness.check()
        return tensor

    def fetch_ahead(self, record: Record[Place]) -> bool:
        """Begin to bring a stored tensor back; see `Stored.prefetch`."""
        self._check_caller()
        with self._changed:
            self._check_open(record)
            self._sweep()
            if record.ahead is None and record.num_bytes:
                if self._ahead_bytes + record.num_bytes > self.max_in_flight_bytes:
                    return False
                record.ahead = self._begin_fetch(record)
                self._ahead_bytes += record.num_bytes
            return True

    def leave(self, record: Record[Place]) -> None:
        """Give back the memory of a tensor; see `Stored.drain`."""
        self._check_caller()
        with self._changed:
            self._begin_call(record)
            if record.place is not None and record.source is not None:
                self._let_go(record)
                self._begin_call(record)

    def drop(self, record: Record[Place]) -> None:
        """Give a tensor's bytes up; it never waits, so the garbage collector may call it anywhere (step 6)."""
        if record.freed or self._pid != os.getpid():
            return
        record.freed = True
        self._dropped.append(record)
        if is_capturing(self.device):
            return  # the next call gives it up
        if self._changed.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._changed.release()

    def flush(self) -> None:
        """Wait until everything that was put has been moved, or could not be; then tell of what could not."""
        self._check_caller()
        with self._changed:
            self._check_open()
            self._make_room(0)
            self._begin_call()

    def drain(self) -> None:
        """Give back the memory of everything that was put; see `Tier.drain`."""
        self.flush()

    def traffic(self) -> Traffic:
        """Return what was moved so far."""
        self._check_caller()
        with self._changed:
            self._reap()
            self._sweep()
            bytes_now = (self._stored_bytes(), self._most_stored_bytes, self._pinned_bytes(), self._kept_bytes)
        moved = (self._out.num_bytes, self._in.num_bytes, self._out.seconds, self._in.seconds)
        return Traffic(*moved, *bytes_now, self._most_kept_bytes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, device={str(self.device)!r})"

    # What the tiers call, under the lock

    def _moved(self, record: Record[Place], failure: OffloadError | None = None) -> None:
        """Step 4: a tensor has left, or could not."""
        self._in_flight_bytes -= record.num_bytes
        if failure is None:
            record.source = None
        else:
            self._failure = failure
            self._vacate(record)
            self._keep(record)
        self._copied(record)
        self._sweep()
        self._changed.notify_all()

    def _copied(self, record: Record[Place]) -> None:
        """A copy to or from a tensor's place has ended."""
        record.busy -= 1
        if record in self._leaving:
            self._settle(record)

    def _settle(self, record: Record[Place]) -> None:
        """Give up the place of a freed tensor, unless a copy uses it."""
        if record.busy:
            self._leaving.add(record)
        else:
            self._leaving.discard(record)
            record.source = None
            self._kept_bytes -= record.num_bytes if record.kept else 0
            record.kept = False
            self._vacate(record)

    # Steps of the calls, under the lock

    def _check_caller(self) -> None:
        if self._pid != os.getpid():
            raise OffloadError(
                f"{self!r} was made in process {self._pid}; a forked process has neither its threads nor its copy "
                "streams: make a tier of its own there"
            )
        if is_capturing(self.device):
            raise OffloadError(
                f"{self!r} was called while a CUDA graph is captured, in which its copies can neither be waited for "
                "nor bounded; capture without offloading, or offload at the boundaries of the graph"
            )

    def _check_open(self, record: Record[Place] | None = None) -> None:
        if self._closed:
            raise OffloadError(f"{self!r} is closed and what it stored is gone; close it after the last backward")
        if record is not None and record.freed:
            raise OffloadError("the stored tensor was freed; free it after its last get()")

    def _begin_call(self, record: Record[Place] | None = None) -> None:
        """Look at what happened since the last call: a close, a failure, tensors freed."""
        self._check_open(record)
        failure, self._failure = self._failure, None
        if failure is not None:
            self._report(failure)
        self._reap()
        self._sweep()

    def _report(self, failure: OffloadError) -> None:
        if self._on_full == "raise":
            raise failure
        if not self._warned:
            self._warned = True
            warnings.warn(f"tensors stay on {self.device} and are not offloaded: {failure}", stacklevel=4)

    def _place(self, record: Record[Place]) -> None:
        place = self._reserve(record.num_bytes)
        if place is None and self._leaving:
            self._make_room(0)
            self._begin_call()
            place = self._reserve(record.num_bytes)
        if place is None:
            self._report(self._full(record.num_bytes))
            return self._keep(record)
        record.place, record.busy = place, 1
        self._in_flight_bytes += record.num_bytes
        self._most_stored_bytes = max(self._most_stored_bytes, self._stored_bytes())
        try:
            return self._send(record, place)
        except BaseException:
            self._vacate(record)  # nobody gets a handle of it
            self._moved(record)
            raise

    def _is_late_for(self, num_bytes: int) -> bool:
        """Tell whether a tensor is to stay because copies are late: they are, and the bound on that leaves room."""
        if not num_bytes or self._kept_bytes + num_bytes > self._keep_bytes:
            return False
        late_bytes = self._late_bytes()
        return late_bytes > 0 and late_bytes + num_bytes > self.max_in_flight_bytes

    def _keep(self, record: Record[Place]) -> None:
        """Leave a tensor on the device until it is freed."""
        record.kept = True
        self._kept_bytes += record.num_bytes
        self._most_kept_bytes = max(self._most_kept_bytes, self._kept_bytes)

    def _begin_fetch(self, record: Record[Place]) -> Arrival:
        """Step 5."""
        if record.source is not None:
            return Taken(partial(clone, record.source, record.made))
        assert record.place is not None
        return self._bring(record, record.place)

    def _sweep(self) -> None:
        """Step 6, the second half."""
        while self._dropped:
            record = self._dropped.popleft()
            if record.ahead is not None:
                self._ahead_bytes -= record.num_bytes
                record.ahead.abandon()
                record.ahead = None
            self._settle(record)

    def _vacate(self, record: Record[Place]) -> None:
        place, record.place = record.place, None
        if place is not None:
            self._release(place)
