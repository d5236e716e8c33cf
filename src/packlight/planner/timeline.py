"""Follows every storage on the training device: its birth, its death, the live bytes and their peak.

On CUDA the allocator counts bytes; on the CPU PyTorch counts nothing, and the profiler's memory events come only after
the fact and know no categories. The idea: every tensor is the result of an operator, so a dispatch mode sees each new
storage once (also inside backward and in the optimiser, whose operators go through the same dispatcher), and a weak
reference to the storage tells its end. The same class follows real steps and steps on fake tensors, so that prediction
and measurement count alike, storage by storage.

Not seen: scratch memory that an operator's kernel takes and returns inside one call.
"""

import bisect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from packlight.activations.buffers import is_recomputing
from packlight.planner.places import Places
from packlight.planner.tensors import inner_tensors
from packlight.records import CATEGORIES

ALLOCATION_BYTES = {"cuda": 512}
"""What the device's allocator rounds up to. Source: kMinBlockSize in torch's CUDACachingAllocator."""
_LEFT_OUT = -1


@dataclass
class Entry:
    """A storage on the line: events of birth and death (None while it lives), phase of birth, category if known.

    A gradient of a parameter that is stepped has the event at which it is complete, too. What is not small has a site
    and a line of code, where they are known; see `places.py`.
    """

    num_bytes: int
    born: int
    phase: str
    category: str | None = None
    died: int | None = None
    completed: int | None = None
    site: str = ""
    code: str = ""


class Timeline(TorchDispatchMode):
    """A dispatch mode that writes the line of events of all storages on one type of device.

    Attributes:
        entries: every storage seen, by index.
        events: the index of the storage born, or the complement (~index) of the one that died, in order.
        live_bytes: bytes of the storages that live now.
        phases: the events at which births of another phase begin, and its name.
    """

    def __init__(self, device_type: str, *, allocator: str = "") -> None:
        """Count storages on devices of type `device_type`, in sizes as an allocator rounds them (its own: "")."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.entries: list[Entry] = []
        self.events: list[int] = []
        self.live_bytes = 0
        self.explicit_phase: str | None = None
        self.places: Places | None = None
        self._granularity = ALLOCATION_BYTES.get(allocator or device_type, 1)
        self._live: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._highest_bytes = 0
        self.phases: list[tuple[int, str]] = []
        self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then note the storages of its results that are new."""
        out = func(*args, **(kwargs or {}))
        if not self._paused:
            self.observe(func, args, kwargs or {}, out)
        return out

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note what one operator made; a subclass adds what else it wants to know of operators."""
        num_before = len(self.entries)
        for result in out if isinstance(out, tuple | list) else (out,):
            if isinstance(result, torch.Tensor):
                self.add(result)
        if self.places is not None and self.explicit_phase != "optimizer":
            self.places.name(self.entries[num_before:], out)

    def add(self, tensor: torch.Tensor, *, category: str | None = None, site: str = "") -> int | None:
        """Note a tensor's storage, unless it is known or on another device; name it, if a name is given.

        Returns:
            The storage's index, the first one's where a tensor consists of several; None for another device's.
        """
        if tensor.device.type != self.device_type:
            return None
        indices = [self._add_storage(part.untyped_storage(), category) for part in inner_tensors(tensor)]
        for index in indices:
            if site and index is not None:
                self.entries[index].site = site
        return indices[0] if indices else None

    def _add_storage(self, storage: torch.UntypedStorage, category: str | None) -> int | None:
        key, num_bytes = storage._cdata, self.round(storage.nbytes())
        known = self._live.get(key)
        if known is not None:
            index = known[0]
            if index == _LEFT_OUT:
                return None
            entry = self.entries[index]
            entry.category = category or entry.category
            if entry.num_bytes == num_bytes:
                return index
            category = entry.category
            self._end(key)  # it was resized
        index = len(self.entries)
        self._live[key] = (index, weakref.ref(storage, lambda _: self._end(key)))
        self._begin(index, Entry(num_bytes, self.now(), self.phase(), category))
        return index

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note that a storage has another size now: FSDP2 empties those of gathered parameters and fills them again."""
        if storage.device.type != self.device_type or self._paused:
            return
        known = self._live.get(storage._cdata)
        category = None if known is None or known[0] == _LEFT_OUT else self.entries[known[0]].category
        if storage.nbytes():
            self._add_storage(storage, category)
        else:
            self._end(storage._cdata)

    def index(self, tensor: torch.Tensor) -> int | None:
        """Return the index of a tensor's storage, None where it is not followed."""
        plain = next(inner_tensors(tensor), None)
        known = None if plain is None else self._live.get(plain.untyped_storage()._cdata)
        return known[0] if known is not None and known[0] != _LEFT_OUT else None

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Count neither a tensor's storage nor any view of it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._live[key] = (_LEFT_OUT, weakref.ref(storage, lambda _: self._end(key)))

    def now(self) -> int:
        """Return the present position on the line."""
        return len(self.events)

    def phase(self) -> str:
        """Return where the step is: what was said explicitly, else whether autograd's engine is running."""
        if torch._C._current_graph_task_id() != -1:
            return "recompute" if is_recomputing() else "backward"
        return self.explicit_phase or "loss"

    def highest_bytes(self) -> int:
        """Return the most live bytes since the last call of this method."""
        highest, self._highest_bytes = self._highest_bytes, self.live_bytes
        return highest

    def unfinished_bytes(self, phase: str) -> int:
        """Return the bytes of storages of no category that were born in a phase and live still."""
        entries = (self.entries[index] for index, _ in self._live.values() if index != _LEFT_OUT)
        return sum(entry.num_bytes for entry in entries if entry.phase == phase and entry.category is None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is made inside."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def close(self) -> None:
        """Let go of every weak reference; the line stays."""
        self._live.clear()

    def peak(self, *, start: int = 0) -> tuple[int, str, dict[str, int]]:
        """Find the highest point of the line from event `start` on.

        Returns:
            Its bytes, the phase it stands in, and its bytes by category.
        """
        at, peak_bytes = self.highest_point(start)
        by_category = dict.fromkeys(CATEGORIES, 0)
        for entry in self.entries:
            if entry.born <= at and (entry.died is None or entry.died > at):
                by_category[self.category_of(entry)] += entry.num_bytes
        return peak_bytes, self._phase_at(at), by_category

    def highest_point(self, start: int = 0) -> tuple[int, int]:
        """Return the event at which most lives from an event on, and the bytes."""
        live, best, best_bytes = 0, start, 0
        for at, event in enumerate(self.events):
            live += self.entries[event].num_bytes if event >= 0 else -self.entries[~event].num_bytes
            if at >= start and live > best_bytes:
                best, best_bytes = at, live
        return best, best_bytes

    def category_of(self, entry: Entry) -> str:
        """Return a storage's category; without one, an activation outlives the phase that made it, a temporary not."""
        if entry.category or entry.phase in ("backward", "optimizer"):
            return entry.category or "temporaries"
        following = bisect.bisect_right(self.phases, (entry.born, "\uffff"))
        phase_end = self.phases[following][0] if following < len(self.phases) else len(self.events)
        return "activations" if entry.died is None or entry.died > phase_end else "temporaries"

    def _phase_at(self, at: int) -> str:
        following = bisect.bisect_right(self.phases, (at, "\uffff"))
        return self.phases[following - 1][1] if following else "forward"

    def round(self, num_bytes: int) -> int:
        """Return what the device's allocator takes for a number of bytes."""
        return -(-num_bytes // self._granularity) * self._granularity

    def _begin(self, index: int, entry: Entry) -> None:
        if not self.phases or self.phases[-1][1] != entry.phase:
            self.phases.append((entry.born, entry.phase))
        self.entries.append(entry)
        self.events.append(index)
        self.live_bytes += entry.num_bytes
        self._highest_bytes = max(self._highest_bytes, self.live_bytes)

    def _end(self, key: int) -> None:
        known = self._live.pop(key, None)
        if known is None or known[0] == _LEFT_OUT:
            return
        entry = self.entries[known[0]]
        entry.died = self.now()
        self.events.append(~known[0])
        self.live_bytes -= entry.num_bytes


class Resizes:
    """Tells lines of events of storages that are resized, which no operator does; `close` puts torch's method back."""

    def __init__(self, line: Timeline) -> None:
        """Begin to tell."""
        self._line, self._is_open = line, True
        self._before = torch.UntypedStorage.__dict__.get("resize_")
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = original(storage, size)
            if self._is_open:
                line.resized(storage)
            return out

        self._own = resize_
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]

    def close(self) -> None:
        """Stop telling; where somebody else has replaced the method since, only step aside."""
        self._is_open = False
        if torch.UntypedStorage.__dict__.get("resize_") is not self._own:
            return
        if self._before is None:
            del torch.UntypedStorage.resize_
        else:
            torch.UntypedStorage.resize_ = self._before  # type: ignore[method-assign]


def take_off(mode: Timeline) -> bool:
    """Remove a mode from the stack, wherever it stands; modes pushed after it stay in their order.

    Returns:
        Whether it was on the stack.
    """
    stack = _get_current_dispatch_mode_stack()
    if mode not in stack:
        return False
    above = [_pop_mode() for _ in stack[stack.index(mode) + 1 :]]
    mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    for other in reversed(above):
        _push_mode(other)
    return True


def put_under(mode: Timeline) -> None:
    """Put a mode at the bottom of the stack, unless it is on it, so that a script's own modes come and go above it."""
    stack = _get_current_dispatch_mode_stack()
    if mode in stack:
        return
    above = [_pop_mode() for _ in stack]
    mode.__enter__()  # type: ignore[no-untyped-call]
    for other in reversed(above):
        _push_mode(other)
