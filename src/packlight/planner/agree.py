"""Ranks that gather from each other what they compute with have to do the same; so they agree on one plan.

A block that is computed again gathers its parameters again, so ranks with different plans would wait for each other
forever. Each rank plans from what it measured; the plan of the rank that holds most is everybody's. All ranks of the
group ask at the same points of a step, in the same order.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch.utils._python_dispatch import _disable_current_modes

from packlight.budget import BudgetError
from packlight.planner.places import level_of_user
from packlight.planner.request import SessionStop
from packlight.records import Plan
from packlight.step import Profile

GROWTH_ON_A_RANK = (
    "packlight: a plan would be made anew {}; ranks that share a model keep their plan, and the peak may exceed the "
    "budget. Let the first step be the largest"
)


def warn_of_growth(told: str) -> None:
    """Warn of a step that is larger on one rank.

    Args:
        told: what it is larger for.
    """
    warnings.warn(GROWTH_ON_A_RANK.format(told), stacklevel=level_of_user())


class Agreement:
    """What the ranks of a process group agree on; without a group a rank decides for itself.

    Args:
        group: a process group of torch.distributed; None for one process.
        is_shared: whether its ranks compute with what they gather from each other, so that none may do a part of a step
            again or otherwise than the others. Replicas (DDP) agree on plans alone, for their states' formats.
    """

    def __init__(self, group: Any = None, *, is_shared: bool = True) -> None:
        self._group, self._is_shared = group, is_shared

    @property
    def is_shared(self) -> bool:
        """Whether a step is the work of several ranks."""
        return self._group is not None and self._is_shared

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all."""
        from torch import distributed

        return not self.is_shared or distributed.get_rank(self._group) == 0

    def in_step(self) -> "Agreement":
        """Return with whom a step's own choices are agreed on: with nobody, among replicas."""
        return self if self.is_shared else Agreement()

    def made(self, make: Callable[[], tuple[Profile, Plan]]) -> tuple[Profile, Plan]:
        """Make a plan, and agree on it.

        Returns:
            This rank's profile, and everybody's plan.

        Raises:
            SessionStop: on all ranks, where `make` raises it on one of them; that which needs most is named.
            BudgetError: the same.
            ValueError: the same.
        """
        if self._group is None:
            return make()
        made: tuple[Profile, Plan] | None = None
        refusal, failure = None, None
        try:
            made = make()
        except (SessionStop, Exception) as error:  # the others wait for an answer, whatever it is
            refusal = _Refusal(str(error), getattr(error, "exit_status", 0), getattr(error, "smallest_bytes", None))
            failure = None if isinstance(error, SessionStop | ValueError) else error
        found = self._gathered((None if made is None else made[1], refusal))
        if failure is not None:
            raise failure
        refusals = [each for _, each in found if each is not None]
        if refusals:
            max(refusals, key=lambda each: each.smallest_bytes or 0).stop()
        assert made is not None
        return made[0], _of_fullest([plan for plan, _ in found])

    def plan(self, plan: Plan) -> Plan:
        """Return everybody's plan, from each rank's own."""
        return plan if self._group is None else _of_fullest(self._gathered(plan))

    def largest(self, number: int) -> int:
        """Return the largest number that a rank has."""
        return number if self._group is None else max(self._gathered(number))

    def _gathered(self, own: Any) -> list[Any]:
        from torch import distributed

        found: list[Any] = [None] * distributed.get_world_size(self._group)
        with _disable_current_modes():
            distributed.all_gather_object(found, own, group=self._group)
        return found


@dataclass(frozen=True)
class _Refusal:
    """Why a rank has no plan; `exit_status` is 0 where no script is to be ended."""

    message: str
    exit_status: int
    smallest_bytes: int | None

    def stop(self) -> NoReturn:
        """Raise on this rank what was raised on that one."""
        if self.exit_status:
            raise SessionStop(self.message, exit_status=self.exit_status, smallest_bytes=self.smallest_bytes)
        if self.smallest_bytes is not None:
            raise BudgetError(self.message, smallest_bytes=self.smallest_bytes)
        raise ValueError(self.message)


def _of_fullest(plans: list[Plan]) -> Plan:
    """Return the plan of the rank that would hold most if nothing were changed; the first of several."""
    return max(plans, key=lambda plan: plan.estimate.plain_peak_bytes)
