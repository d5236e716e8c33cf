"""Which parameters are read when, so that none is stepped before something reads it that wants the old value.

Autograd watches what it saves itself. A parameter that a model reads besides (`weight.detach()`, under `no_grad`) is
not watched, and a block that runs its forward again in backward would read it after a step inside backward, and compute
other gradients without a word. On fake tensors both are seen: when a parameter's gradient is complete, and when an
operator takes the parameter, in a block's forward or later.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from packlight.planner.draft import DraftRegion
from packlight.planner.timeline import Timeline


class Reads:
    """The parameters that operators of one trace take.

    Attributes:
        is_on: whether operators are those of forward and backward; an optimiser reads what it steps.
    """

    def __init__(self, line: Timeline) -> None:
        """Follow the parameters that stand on a line."""
        self._line = line
        self._completed: dict[int, int] = {}
        self._inside: dict[int, set[int]] = {}
        self._is_late = self.is_on = False
        self._regions: list[int] = []

    def inside(self, regions: list[int]) -> None:
        """Say which blocks' calls are running, by their numbers; the list is read as it changes."""
        self._regions, self.is_on = regions, True

    def complete(self, parameter: torch.Tensor, event: int) -> None:
        """Note that a parameter's gradient is complete."""
        index = self._line.index(parameter)
        if index is not None:
            self._completed[index] = event

    def note(self, args: Any, kwargs: Any) -> None:
        """Note what an operator takes."""
        if not self.is_on:
            return
        for tensor in tree_leaves((args, kwargs)):
            index = self._line.index(tensor) if isinstance(tensor, torch.Tensor) else None
            if index is None or self._line.entries[index].category != "parameters":
                continue
            self._is_late |= index in self._completed
            for region in self._regions:
                self._inside.setdefault(region, set()).add(index)

    def are_late(self, regions: Iterable[DraftRegion]) -> bool:
        """Tell whether a parameter is read after its gradient is complete, if any of the blocks is recomputed."""
        return self._is_late or any(
            self._completed.get(index, region.unpacked) < region.unpacked
            for number, region in enumerate(regions)
            if region.unpacked is not None
            for index in self._inside.get(number, ())
        )
