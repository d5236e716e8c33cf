"""What the plan in force was made for, and whether a call of the model goes beyond it.

A step grows in mid-run: sequences of other lengths come, a body is unfrozen after its head has been trained, a second
optimiser is made. The first call that goes beyond all that was planned for wants another plan, before its forward runs.
"""

import math
import warnings
from dataclasses import dataclass

from torch import nn

from packlight.planner.loop import Call
from packlight.planner.places import level_of_user

Shapes = tuple[tuple[int, ...], ...]

MAX_CHANGES = 8
"""So often a plan is made because other parameters get gradients; a loop that takes turns would wait for plans only."""


def covers(known: Shapes, shapes: Shapes) -> bool:
    """Tell whether arguments are no longer than known ones in any dimension."""
    if [len(shape) for shape in shapes] != [len(shape) for shape in known]:
        return False
    pairs = zip(known, shapes, strict=True)
    return all(length <= most for most_shape, shape in pairs for most, length in zip(most_shape, shape, strict=True))


def num_elements(shapes: Shapes) -> int:
    """Return the elements of tensors of these shapes together."""
    return sum(map(math.prod, shapes))


@dataclass(frozen=True)
class Growth:
    """Why a plan is made anew.

    Attributes:
        told: the reason, in words.
        ratio: by which the batch is larger than the largest so far.
        supersedes: whether the plan in force has met no batch, and was made for none that is longer in any dimension.
        num_steps: so many show what it takes: new states are there from the second on.
    """

    told: str
    ratio: float
    supersedes: bool
    num_steps: int


class Scope:
    """Batches and trained parameters that plans were made for.

    Args:
        call: the first of the model.
        model: whose parameters get gradients or not.
    """

    def __init__(self, call: Call, model: nn.Module) -> None:
        self._model, self._shapes = model, [call.shapes()]
        self._trained, self._num_changes = self._trained_now(), 0
        self._by_optimizer, self._num_met = False, 0

    @property
    def num_elements(self) -> int:
        """Elements of the largest batch."""
        return max(map(num_elements, self._shapes), default=0)

    def planned(self) -> int:
        """Note that a plan has been made between steps; return the elements of the largest batch."""
        self._num_met = 0
        return self.num_elements

    def met_optimizer(self) -> None:
        """Count nothing as planned for: another optimiser steps parameters now."""
        self._shapes.clear()
        self._by_optimizer = True

    def growth(self, call: Call) -> Growth | None:
        """Take in a call with gradients.

        Args:
            call: of the model.

        Returns:
            In which way it goes beyond all before; None where it does not.
        """
        shapes, others = call.shapes(), len(self._trained_now() - self._trained)
        if others and self._num_changes < MAX_CHANGES:
            self._num_changes += 1
            self._trained = self._trained_now()
        elif any(covers(known, shapes) for known in self._shapes):
            if others and self._num_changes == MAX_CHANGES:
                self._num_changes += 1
                _warn_of_changes()
            self._num_met += 1
            return None
        largest = self.num_elements
        supersedes = not self._num_met and all(covers(shapes, known) for known in self._shapes)
        self._shapes.append(shapes)
        self._num_met = 1  # this one, under the plan that is made for it
        ratio = max(1.0, num_elements(shapes) / largest) if largest else 1.0
        num_steps = 2 if others or self._by_optimizer else 1
        return Growth(self._told(others), ratio, supersedes, num_steps)

    def _told(self, others: int) -> str:
        by_optimizer, self._by_optimizer = self._by_optimizer, False
        if by_optimizer:
            return "for another optimiser"
        return f"for {others} parameters more that get gradients" if others else "for a larger batch"

    def _trained_now(self) -> frozenset[int]:
        return frozenset(at for at, each in enumerate(self._model.parameters()) if each.requires_grad)


def _warn_of_changes() -> None:
    warnings.warn(
        f"packlight: which parameters get gradients has changed more than {MAX_CHANGES} times; the last plan stays, "
        "and the peak may exceed the budget",
        stacklevel=level_of_user(),
    )
