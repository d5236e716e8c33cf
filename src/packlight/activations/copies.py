"""Copies between a device and pinned host memory, and the order that they keep with compute.

Copies on a stream of their own run beside compute, but then nothing orders them with it. `record_stream` would, at
the price of memory that is given back late and at a time that depends on the host (pytorch#147168). The idea (FSDP2,
zero bubble pipelines): events order the streams, and whoever began a copy keeps its tensors until one of two things.

```
compute   ... 1 tensor computed,          or result allocated .......... 5 waits for 4 . tensor dropped, or result used
side              2 waits for 1 ... 3 copy ... 4 event
host      keeps the tensor until 4 is complete, or until 5 is queued, whichever comes first
```

Step 5 frees a tensor for the compute stream alone, but its memory goes back to the stream that it was allocated on,
which the allocator does not tell. So the short way is taken only where compute runs on the device's default stream, as
nearly all of it does; on another one, the tensor is kept until 4 is complete.

One side stream does the copies of both directions, one after the other. So a slot of host memory may be given out
again at once: the next copy that touches it stands behind the last one. The host itself never touches a slot.

On the CPU, where there are no streams, a copy is over when it returns; the tests of order bring copies of their own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Copy(Protocol):
    """One copy that was begun."""

    def is_ready(self) -> bool:
        """Tell whether compute has come past step 1, so that nothing but other copies can hold this one up."""

    def is_done(self) -> bool:
        """Tell whether the last byte is there, without waiting."""

    def wait(self) -> None:
        """Make the host wait for it."""

    def order(self) -> None:
        """Make the stream that began it wait for it (step 5), but not the host."""

    def settle(self) -> None:
        """Make whoever gets the source's memory next work behind the copy; the caller may then drop the source."""

    def lend(self, result: Tensor) -> Tensor:
        """Make the present stream wait for it, so that it may use the result, and return the result."""

    def seconds(self) -> float:
        """Return how long it took; it must be done."""


class Copier(Protocol):
    """Copies in the order of its calls."""

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Begin to copy; both uint8, [num_bytes]; the caller keeps both until the copy is done or ordered."""

    def wait(self) -> None:
        """Make the host wait for all copies."""


class StreamCopier:
    """Copies on one side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream."""
        self._side = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Steps 1 to 4."""
        present = torch.cuda.current_stream(self._side.device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        ready = torch.cuda.Event()
        ready.record(present)
        self._side.wait_event(ready)  # step 2
        with torch.no_grad(), torch.cuda.stream(self._side):
            begin.record(self._side)
            target.copy_(source, non_blocking=True)  # step 3
            end.record(self._side)  # step 4
        return _StreamCopy(present, ready, begin, end)

    def wait(self) -> None:
        """Wait for the side stream."""
        self._side.synchronize()


class _StreamCopy:
    def __init__(self, stream: torch.cuda.Stream, *events: torch.cuda.Event) -> None:
        self._stream = stream
        self._ready, self._begin, self._end = events

    def is_ready(self) -> bool:
        return bool(self._ready.query())

    def is_done(self) -> bool:
        return bool(self._end.query())

    def wait(self) -> None:
        self._end.synchronize()

    def order(self) -> None:
        self._stream.wait_event(self._end)

    def settle(self) -> None:
        if self._stream == torch.cuda.default_stream(self._stream.device):
            self.order()
        else:
            self.wait()  # not record_stream: the allocator would find the memory free late, and take more meanwhile

    def lend(self, result: Tensor) -> Tensor:
        self.order()  # the result's memory goes back to this stream, even if another one uses it
        present = torch.cuda.current_stream(result.device)
        if present != self._stream:
            present.wait_event(self._end)
        return lend(result, self._stream)

    def seconds(self) -> float:
        return float(self._begin.elapsed_time(self._end)) / 1e3  # it is in milliseconds


class HostCopier:
    """Copies within the host's memory, at once."""

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Copy."""
        begin = time.perf_counter()
        target.copy_(source)
        return HostCopy(time.perf_counter() - begin)

    def wait(self) -> None:
        """Nothing is under way."""


class HostCopy:
    """A copy that is over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def is_done(self) -> bool:
        """Return True: it is."""
        return True

    is_ready = is_done

    def wait(self) -> None:
        """It is over."""

    order = settle = wait

    def lend(self, result: Tensor) -> Tensor:
        """Return the result, which is complete."""
        return result

    def seconds(self) -> float:
        """Return what it took."""
        return self._seconds


def make_copier(device: torch.device) -> Copier:
    """Return what copies between the host and a device."""
    return StreamCopier(device) if device.type == "cuda" else HostCopier()


def present_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream that this thread computes on; None on the CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def stamp(device: torch.device) -> torch.cuda.Event | None:
    """Note how far this thread's stream has come: `wait_for` makes another thread wait until it has got there."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # whoever waits sleeps, rather than spin on a core
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for(event: torch.cuda.Event | None) -> None:
    """Make the host wait for a stamp; on the CPU there is none, and nothing to wait for."""
    if event is not None:
        event.synchronize()


def lend(result: Tensor, stream: torch.cuda.Stream | None) -> Tensor:
    """Return a tensor that was allocated on `stream` for use on the present one."""
    if stream is not None and torch.cuda.current_stream(result.device) != stream:
        # Rare: brought back ahead of time on one stream, used on another. Only the allocator can order those two.
        result.record_stream(torch.cuda.current_stream(result.device))
    return result


class Moment(NamedTuple):
    """A point in the work of a stream."""

    stream: torch.cuda.Stream
    event: torch.cuda.Event


def moment(device: torch.device) -> Moment | None:
    """Note how far the present stream has come, for other streams to wait for; None on the CPU."""
    stream = present_stream(device)
    if stream is None:
        return None
    event = torch.cuda.Event()
    event.record(stream)
    return Moment(stream, event)


def share(result: Tensor, since: Moment | None) -> Tensor:
    """Return a tensor of a stream's, which is complete since a moment, for use on the present stream."""
    if since is not None and (present := torch.cuda.current_stream(since.stream.device)) != since.stream:
        present.wait_event(since.event)
        return lend(result, since.stream)
    return result


@contextmanager
def reading(since: Moment | None) -> Iterator[None]:
    """Let the present stream read in the body what is complete since a moment of another one.

    What was read may be dropped after the body: the stream that gets the memory back waits for the reading.
    """
    present = None if since is None else torch.cuda.current_stream(since.stream.device)
    if since is None or present is None or present == since.stream:
        yield
        return
    present.wait_event(since.event)
    try:
        yield
    finally:
        since.stream.wait_stream(present)


def clone(source: Tensor, since: Moment | None) -> Tensor:
    """Return a copy of a tensor that is complete since a moment."""
    with reading(since):
        return source.clone()


def is_capturing(device: torch.device) -> bool:
    """Tell whether what this thread queues goes into a CUDA graph: then events may not be asked, nor memory pinned."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
