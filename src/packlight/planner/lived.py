"""Names what lives in the steps that are watched, and keeps the step in which most did.

A line of events knows sizes and moments. What a storage is for is known by whoever holds it: a parameter, its gradient,
one of its optimiser's states, a buffer. Their names are put on the line as they are met; what operators make is named
by `places.py`. Of several steps one is kept as a record, that in which the measured peak stands:

    1 step begins   2 step ends   3 what is loaded for the next step belongs to no step, unless the peak is there
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from packlight.memory import Held, Memory, Phase, condensed
from packlight.planner.cut import stepped_by
from packlight.planner.likeness import state_tensors
from packlight.planner.places import Places
from packlight.planner.tensors import flat_tensors
from packlight.planner.timeline import Timeline

Peak = tuple[int, str, dict[str, int]]
"""Bytes, the phase, and the bytes by category."""


@dataclass
class Window:
    """A step on the line: its number, and the events with which it begins and ends (None: it goes on)."""

    number: int
    start: int
    stop: int | None = None


class Lived:
    """What lived in the watched steps of a model and its optimisers.

    Attributes:
        memory: the step in which the peak stands, of the lines that are closed.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        self._line: Timeline | None = None
        self._windows: list[Window] = []
        self._names: dict[int, str] = {}
        self._peak: Peak = (0, "", {})
        self.memory: Memory | None = None

    def follow(self, line: Timeline) -> None:
        """Begin with a new line: name what the model and its optimisers have."""
        self._line, self._windows = line, []
        line.places = Places(self._model)
        self._names = {id(each): name for name, each in self._model.named_parameters()}
        for parameter in (*self._model.parameters(), *stepped_by(self._optimizers)):
            line.add(parameter, category="parameters", site=self._names.get(id(parameter), ""))
        self._names |= {id(each): f"buffer {name}" for name, each in self._model.named_buffers()}
        self.name_gradients()
        self.name_states()

    def add_other(self, tensor: torch.Tensor) -> None:
        """Note what the script holds: a batch, a data set, the model's buffers."""
        if self._line is not None:
            self._line.add(tensor, category="other", site=self._names.get(id(tensor), ""))

    def name_gradients(self) -> None:
        """Note which storages are gradients, and whose."""
        for parameter in (*self._model.parameters(), *stepped_by(self._optimizers)):
            if self._line is not None and parameter.grad is not None and parameter.grad.layout == torch.strided:
                self._line.add(parameter.grad, category="gradients", site=self._of(parameter, "gradient"))

    def name_states(self) -> None:
        """Note which storages are optimisers' states, and whose."""
        if self._line is None:
            return
        for optimizer in self._optimizers:
            sites = self._sites_of_states(optimizer)
            for tensor in state_tensors(optimizer):
                self._line.add(tensor, category="optimizer_states", site=sites.get(id(tensor), ""))

    def _sites_of_states(self, optimizer: torch.optim.Optimizer) -> dict[int, str]:
        """Return the names of the tensors that are a parameter's states; those that all states share have none."""
        sites: dict[int, str] = {}
        for parameter, state in optimizer.state.items():
            for kind, value in state.items() if isinstance(state, dict) else [("state", state)]:
                sites |= {id(tensor): self._of(parameter, str(kind)) for tensor in flat_tensors(value)}
        return sites

    def _of(self, parameter: object, what: str) -> str:
        name = self._names.get(id(parameter), "")
        return f"{what} of {name}" if name else what

    def step_begins(self, number: int) -> None:
        """Note that the next event belongs to a step (mark 1)."""
        if self._line is not None:
            self._windows.append(Window(number, max(0, self._line.now() - 1)))

    def step_ends(self) -> None:
        """Note that the step is over, as far as is known (mark 2)."""
        if self._line is not None and self._windows:
            self._windows[-1].stop = self._line.now()

    def close(self) -> None:
        """Keep what is wanted of the line."""
        self._peak, self.memory = self.now()
        self._line = None

    def now(self) -> tuple[Peak, Memory | None]:
        """Return the highest peak so far, and the step that it stands in."""
        if self._line is None or (peak := self._line.peak())[0] <= self._peak[0]:
            return self._peak, self.memory
        return peak, _record(self._line, self._windows)


def _record(line: Timeline, windows: Sequence[Window]) -> Memory | None:
    """Return the step in which a line's peak stands."""
    if not windows:
        return None
    peak, _ = line.highest_point()
    window = next((each for each in reversed(windows) if each.start <= peak), windows[0])
    begin = min(window.start, peak)
    end = max(peak + 1, len(line.events) if window.stop is None else window.stop)
    lives = (
        Held(
            entry.num_bytes,
            max(begin, entry.born) - begin,
            (end if entry.died is None else min(end, entry.died)) - begin,
            line.category_of(entry),
            entry.site or ("the optimiser's step" if entry.phase == "optimizer" else ""),
            entry.code,
        )
        for entry in line.entries
        if entry.born < end and (entry.died is None or entry.died > begin)
    )
    phases = _phases(line, begin, end)
    return condensed(lives, num_events=end - begin, phases=phases, peak=peak - begin, step=window.number)


def _phases(line: Timeline, begin: int, end: int) -> list[Phase]:
    """Return the parts of a step; second runs of forwards are a part of backward."""
    found: list[Phase] = []
    for (start, name), (following, _) in zip(line.phases, [*line.phases[1:], (len(line.events), "")], strict=True):
        name = "backward" if name == "recompute" else name
        if start <= begin or start >= end:  # before the first birth of a step nothing has begun
            continue
        start, following = start - begin, min(end, following) - begin
        if found and found[-1].name == name:
            found[-1] = Phase(name, found[-1].start, following)
        else:
            found.append(Phase(name, start if found else 0, following))
    return found
