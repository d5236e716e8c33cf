"""Finds the fastest plan whose predicted peak fits the budget.

torch's own choices are all or nothing, or a fraction that nobody can relate to bytes. Here every block may be
recomputed and every storage group encoded or moved, for each format of the optimiser's states; an integer program
chooses (`program.py`, `search.py`), the whole line of events judges (`cost.py`), and the fastest result is taken, the
least lossy of those that are as fast.
"""

import functools
import itertools
import math
from collections.abc import Sequence

from packlight.budget import Budget, BudgetError, format_bytes
from packlight.planner.cost import Cost, StepCost
from packlight.planner.moving import ONE_AT_A_TIME
from packlight.planner.options import encodings, moves
from packlight.planner.outcome import plain_cost, plan_of
from packlight.planner.program import Option
from packlight.planner.search import PATIENT_SECONDS, Chosen, Search
from packlight.records import Plan
from packlight.step import OptimizerCost, Profile

HEADROOM = 0.01
"""Share of the budget that a plan leaves free, for scalars and lists that a script makes beside the step."""

LOADED_BATCHES = 2
"""On the CPU a data loader's next batches share the device with the step; so many are left room for."""

EXACT_FORMATS = ("fp32", "as is")

WINDOW_GROUPS = (3, 6)
"""A tier's window is as large as so many of a block's largest groups: attention saves four groups at once and reads
them back at once, and through a smaller window compute waits for them."""


class Solver:
    """Makes plans for one profiled step, for any budgets.

    Args:
        step: the profile.
        exact: only choices that leave every loss and gradient bit-equal.
    """

    def __init__(self, step: Profile, *, exact: bool = False) -> None:
        self.step, self.exact = step, exact
        self._costs = StepCost(step)
        self._optimizers: Sequence[OptimizerCost] = allowed_formats(step, exact=exact) or step.optimizers[:1]
        on_device = [cost for cost in self._optimizers if not cost.host_bytes]
        self._at_hand: Sequence[OptimizerCost] = on_device or self._optimizers
        self._alone: dict[tuple[str, tuple[int, ...]], list[Search]] = {}
        self._aside = [cost for cost in self._optimizers if cost not in self._at_hand]

    def fastest(self, budget: Budget) -> Plan | int:
        """Choose for a budget.

        Args:
            budget: bytes allowed on the device.

        Returns:
            The fastest plan that fits, or the smallest budget that one would.
        """
        limit_bytes = _limit_bytes(self.step, budget)
        found = [chosen for each in self._searches if (chosen := each.fastest(limit_bytes)) is not None]
        best = min(found, key=self._rated, default=None)
        best = self._with_states_on_host(best, limit_bytes)
        chosen = best or self._least_that_fits(limit_bytes)
        if chosen is None:
            return self.smallest_bytes
        return self._plan(chosen, budget, smallest_bytes=self.smallest_bytes)

    def _with_states_on_host(self, best: Chosen | None, limit_bytes: int) -> Chosen | None:
        """Return the plan, or one with states in host memory that is better.

        They are searched for by themselves, and only where their own time leaves a chance: as further choices beside
        the other formats they made the program so much harder that it found worse plans in its time.
        """
        windows: tuple[int, ...] = (ONE_AT_A_TIME, WINDOW_GROUPS[0] * self._block_group_bytes)
        if best is not None and best.moves:
            windows = (best.window_bytes,)
        for optimizer in sorted(self._aside, key=self._rated_alone):
            alone = self._rated_alone(optimizer)
            for search in self._searches_with(optimizer, windows):
                if best is not None and alone >= self._rated(best):
                    break
                found = search.fastest(limit_bytes)
                best = min(filter(None, (best, found)), key=self._rated, default=None)
        return best

    def _rated(self, chosen: Chosen) -> float:
        return chosen.rated(self._optimizers, self._plain.seconds)

    def _rated_alone(self, optimizer: OptimizerCost) -> float:
        """Rate a state format where all else is kept, which no plan with it can be better than."""
        return self._rated(Chosen(self._costs.price((), optimizer), optimizer))

    def _least_that_fits(self, limit_bytes: int) -> Chosen | None:
        """Return a plan where the integer program found none in time.

        At the smallest budgets it is hard to find any. The plan with the lowest peak is one, and may be a slow one.
        """
        found = list[Chosen]()
        for optimizer, search in itertools.product(self._formats, self._tightest):
            least = search.least(optimizer)
            if least.cost.peak_bytes <= limit_bytes:
                found.append(search.without_needless(least, limit_bytes))
        if found:
            seconds = PATIENT_SECONDS / len(self._tightest)
            patient = (each.fastest(limit_bytes, max_seconds=seconds) for each in self._tightest)
            found += [chosen for chosen in patient if chosen is not None]
        return min(found, key=self._rated, default=None)

    def least(self, budget: Budget) -> Plan:
        """Make the plan with the lowest peak, with the optimiser as it is.

        Args:
            budget: bytes allowed on the device, for the record.

        Returns:
            The plan, which may exceed the budget.
        """
        found = (search.least(self._formats[0]) for search in self._tightest)
        chosen = min(found, key=lambda each: each.cost.peak_bytes)
        return self._plan(chosen, budget, smallest_bytes=chosen.cost.peak_bytes)

    @functools.cached_property
    def smallest_bytes(self) -> int:
        """The smallest budget that something fits."""
        peaks = (search.lowest(each).cost.peak_bytes for each in self._formats for search in self._tightest)
        return math.ceil((min(peaks) + _spare_bytes(self.step)) / (1 - HEADROOM))

    @functools.cached_property
    def _plain(self) -> Cost:
        return plain_cost(self._costs)

    @property
    def _formats(self) -> Sequence[OptimizerCost | None]:
        return self._optimizers or [None]

    @functools.cached_property
    def _options(self) -> tuple[dict[Option, float], dict[Option, float]]:
        """What may be done with groups where they are, and what there is beside that with a tier."""
        return encodings(self._costs, exact=self.exact), moves(self._costs, exact=self.exact)

    @functools.cached_property
    def _searches(self) -> list[Search]:
        """Searches without the tier and, where there is one, with it; these differ in the tier's window."""
        windows = (ONE_AT_A_TIME, *(number * self._block_group_bytes for number in WINDOW_GROUPS))
        return self._searches_among(self._at_hand, windows)

    def _searches_with(self, optimizer: OptimizerCost, windows: tuple[int, ...]) -> list[Search]:
        """Searches for one format, which keep what they have learnt from budget to budget."""
        key = optimizer.state_format, windows
        if key not in self._alone:
            self._alone[key] = self._searches_among([optimizer], windows)
        return self._alone[key]

    def _searches_among(self, optimizers: Sequence[OptimizerCost], windows: Sequence[int]) -> list[Search]:
        encoded, moved = self._options
        searches = [Search(self._costs, encoded, optimizers)]
        if moved:
            searches += [Search(self._costs.through(most), encoded | moved, optimizers) for most in windows]
        return searches

    @functools.cached_property
    def _block_group_bytes(self) -> int:
        """The size of the largest group that a block saves; a loss's logits may be far larger, once."""
        costs, saves = self._costs, self.step.saves
        in_blocks = [name for name, group in costs.groups.items() if costs.block_of(saves[group.saves[0]]) is not None]
        return max(map(costs.group_bytes, in_blocks or costs.groups), default=0)

    @property
    def _tightest(self) -> list[Search]:
        """The searches that find the lowest peaks: a wider window only adds to them."""
        return self._searches[:2]

    def _plan(self, chosen: Chosen, budget: Budget, *, smallest_bytes: int) -> Plan:
        return plan_of(self._costs, chosen, self._plain, budget, exact=self.exact, smallest_bytes=smallest_bytes)


def allowed_formats(step: Profile, *, exact: bool) -> Sequence[OptimizerCost]:
    """Return the state formats that may be chosen among, the least lossy first."""
    return [cost for cost in step.optimizers if step.takes(cost) and (not exact or cost.state_format in EXACT_FORMATS)]


def solve(step: Profile, budget: Budget, *, exact: bool = False) -> Plan:
    """Choose for a profiled step; see `Solver.fastest`.

    Args:
        step: the profile.
        budget: bytes allowed on the device.
        exact: only choices that leave every loss and gradient bit-equal.

    Returns:
        The fastest plan that fits.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that would.
    """
    made = Solver(step, exact=exact).fastest(budget)
    if isinstance(made, int):  # raised here, where no frame of the traceback keeps the tensors of `StepCost` alive
        raise BudgetError(_refusal(budget, made, exact=exact), smallest_bytes=made)
    return made


def least_plan(step: Profile, budget: Budget, *, exact: bool) -> Plan:
    """Return the plan with the lowest peak, with the optimiser as it is.

    Args:
        step: the profile.
        budget: bytes allowed on the device; where exact choices fit it, no others are made.
        exact: make no others anyway.

    Returns:
        The plan, which may exceed the budget.
    """
    plan = Solver(step, exact=True).least(budget)
    if exact or plan.estimate.device_peak_bytes <= _limit_bytes(step, budget):
        return plan
    return Solver(step).least(budget)


def _spare_bytes(step: Profile) -> int:
    return LOADED_BATCHES * step.batch_bytes if step.device == "cpu" and not step.hardware else 0


def _limit_bytes(step: Profile, budget: Budget) -> int:
    """Return what the step may take of a budget."""
    return int(budget.device_bytes * (1 - HEADROOM)) - _spare_bytes(step)


def _refusal(budget: Budget, smallest_bytes: int, *, exact: bool) -> str:
    hint = "; choices that are not exact may need less" if exact else ""
    return (
        f"no plan fits {format_bytes(budget.device_bytes)} ({budget.device_bytes} bytes); the smallest budget that "
        f"fits is {smallest_bytes} bytes ({format_bytes(smallest_bytes, rounds_up=True)}){hint}; or try a smaller batch"
    )
