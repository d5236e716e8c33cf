"""What plans were made for, and whether a call of the model goes beyond it.

A step grows in mid-run: sequences of other lengths come, a body is unfrozen after its head has been trained, a second
optimiser is made. The first call that goes beyond all that was planned for wants another plan, before its forward runs.
The idea: a plan covers a pair, the parameters that get gradients and the shapes of the batch, and no plan covers the
most of each that came apart.
"""

import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim.optimizer import Optimizer

from packlight.planner.loop import Call, parameters_of
from packlight.planner.places import level_of_user

Shapes = tuple[tuple[int, ...], ...]

MAX_TURNS = 8
"""So often a plan is made for parameters that get gradients instead of others; such turns might never end."""


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
    """Why a plan is made anew, and for what.

    Attributes:
        told: the reason, in words.
        trained: the parameters that get gradients, by identity.
        shapes: of the batch.
        ratio: by which the batch is larger than the largest so far.
        is_of_trained: whether other parameters are trained or another optimiser is there, as on all replicas at once.
        is_turn: whether some of those that were trained before are not now.
        supersedes: whether the plan in force has met no batch, and was made for none that is longer in any dimension.
    """

    told: str
    trained: frozenset[int]
    shapes: Shapes
    ratio: float
    is_of_trained: bool
    is_turn: bool
    supersedes: bool

    @property
    def num_steps(self) -> int:
        """So many show what it takes: new states are there from the second on."""
        return 2 if self.is_of_trained else 1


class Scope:
    """Batches and trained parameters that plans were made for.

    Args:
        call: the first of the model.
        model: whose parameters get gradients or not.
        optimizers: that train it; others may be added to the list.
    """

    def __init__(self, call: Call, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        self._parameters, self._num_stepped = list[weakref.ref[nn.Parameter]](), -1
        self._known = [(self._trained_now(), call.shapes())]
        self._largest = num_elements(call.shapes())
        self._num_turns, self._num_met = 0, 0

    @property
    def num_elements(self) -> int:
        """Elements of the largest batch."""
        return self._largest

    def met_optimizer(self) -> None:
        """Count nothing as planned for: another optimiser steps parameters now."""
        self._known.clear()

    def growth(self, call: Call) -> Growth | None:
        """Look at a call with gradients.

        Args:
            call: of the model.

        Returns:
            In which way it goes beyond all that was planned for; None where it does not.
        """
        trained, shapes = self._trained_now(), call.shapes()
        if any(trained <= other and covers(known, shapes) for other, known in self._known):
            self._num_met += 1
            return None
        num_more = min((len(trained - other) for other, _ in self._known), default=0)
        is_turn = num_more > 0 and not all(trained >= other for other, _ in self._known)
        if is_turn and self._num_turns >= MAX_TURNS:
            self._warn_of_turns()
            return None
        return Growth(
            told=self._told(num_more),
            trained=trained,
            shapes=shapes,
            ratio=max(1.0, num_elements(shapes) / self._largest) if self._largest else 1.0,
            is_of_trained=num_more > 0 or not self._known,
            is_turn=is_turn,
            supersedes=not self._num_met
            and all(trained >= other and covers(shapes, known) for other, known in self._known),
        )

    def planned(self, growth: Growth) -> None:
        """Note that a plan has been made for a call that is about to run."""
        self._known.append((growth.trained, growth.shapes))
        self._largest = max(self._largest, num_elements(growth.shapes))
        self._num_turns += growth.is_turn
        self._num_met = 1

    def planned_between(self) -> int:
        """Note that a plan has been made between steps; return the elements of the largest batch."""
        self._num_met = 0
        return self._largest

    def _told(self, num_more: int) -> str:
        if not self._known:
            return "for another optimiser"
        if num_more:
            return f"for {num_more} parameter{'s' * (num_more > 1)} more that get gradients"
        return "for a larger batch"

    def _trained_now(self) -> frozenset[int]:
        """Return the parameters that get gradients; the model is only searched where its optimisers have others."""
        num_stepped = sum(1 for optimizer in self._optimizers for _ in parameters_of(optimizer))
        parameters = [reference() for reference in self._parameters]
        if num_stepped != self._num_stepped or any(each is None for each in parameters):
            self._num_stepped = num_stepped
            self._parameters = [weakref.ref(parameter) for parameter in self._model.parameters()]
            parameters = [reference() for reference in self._parameters]
        return frozenset(id(each) for each in parameters if each is not None and each.requires_grad)

    def _warn_of_turns(self) -> None:
        if self._num_turns == MAX_TURNS:
            self._num_turns += 1
            warnings.warn(
                f"packlight: parameters get gradients in turns, and more than {MAX_TURNS} plans would be made for "
                "them; the last plan stays, and the peak may exceed the budget",
                stacklevel=level_of_user(),
            )
