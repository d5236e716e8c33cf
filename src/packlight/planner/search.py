"""Searches a plan: for a state format the fastest that fits, or the one with the lowest peak.

`program.py` chooses under the events that it knows of, `cost.py` says what the choice really peaks at. Between them
goes the search: an event at which the choice takes too much becomes a constraint, until the choice fits.

    nothing is changed -> price -> fits? 1 done, unless compute waits for what moves
                            ^        |   2 then spread the moves over equal blocks (`spread.py`), tell the program how
                            |        |     slow copies were, and search again; the best of a few tries is taken
                            |        | no: the highest peaks become rows
                            +-- solve +
"""

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from packlight.planner.cost import Cost, StepCost
from packlight.planner.held import Treatment
from packlight.planner.program import Option, Program, lossiness, rated
from packlight.planner.spread import Spread
from packlight.step import OptimizerCost

MAX_ROUNDS = 100
"""A search that needs more of them has found a contradiction between program and prices."""
MAX_SECONDS = 4.0
"""Of all solves of a search; each takes half of what is left at most."""
MAX_TRIES = 5
"""So many plans with moves are made for a budget at most, each told of the last one's waiting."""
LITTLE_WAITING = 0.005
"""Below this share of a step's time, waiting is not worth another try."""
LEAST_SECONDS = 0.2
"""Of a solve when nothing is left: the plan is a little slower then, but still one that fits."""

PATIENT_SECONDS = 20.0
"""Of all solves together, where no search had found a plan in time, and there is one."""

MAX_NEEDLESS = 64
"""So many choices at most are tried without, to see whether they are needed."""


Choices = tuple[frozenset[str], Mapping[str, Treatment]]
"""Blocks that are recomputed, and what is done with groups."""


@dataclass(frozen=True)
class Chosen:
    """What is done with blocks, groups and states, through which window of a tier, and what it costs."""

    cost: Cost
    optimizer: OptimizerCost | None
    recomputed: frozenset[str] = frozenset()
    treated: Mapping[str, Treatment] = field(default_factory=dict)
    window_bytes: int = 0

    @property
    def moves(self) -> bool:
        """Whether something goes to the tier."""
        return any(treatment.is_moved for treatment in self.treated.values())

    def rated(self, optimizers: Sequence[OptimizerCost], plain_seconds: float) -> float:
        """Return the slowdown, with a share for what is lossy or needs a tier: these have to spare time.

        Args:
            optimizers: the state formats that there are, the least lossy first.
            plain_seconds: a step's time if nothing is changed.
        """
        number = 0 if self.optimizer is None else lossiness(optimizers)[optimizers.index(self.optimizer)]
        number += any(treatment.is_lossy for treatment in self.treated.values()) + self.moves
        return rated(self.cost.seconds / plain_seconds if plain_seconds else 1.0, number)


class Search:
    """Plans for one profile; what it has learnt serves for all budgets.

    Args:
        costs: prices plans.
        options: what may be done with groups, each with its seconds a step.
        optimizers: the formats that states may have, the least lossy first; none where there is no optimiser.
    """

    def __init__(
        self, costs: StepCost, options: Mapping[Option, float], optimizers: Sequence[OptimizerCost] = ()
    ) -> None:
        self._costs, self._options, self._optimizers = costs, options, optimizers
        self._least: dict[int, Choices] = {}

    @functools.cached_property
    def _program(self) -> Program:
        return Program(self._costs, self._options, self._optimizers)

    @functools.cached_property
    def _spread(self) -> Spread:
        return Spread(self._costs)

    def fastest(self, allowed_bytes: int, *, max_seconds: float = MAX_SECONDS) -> Chosen | None:
        """Find the fastest plan whose peak is allowed, but for a little that what is lossy has to spare.

        Args:
            allowed_bytes: most that may live on the device.
            max_seconds: of all solves, each of which takes half of what is left; a first plan is sought beyond them.

        Returns:
            The plan; None where there is none, or none was found in time.
        """
        chosen = self._priced(frozenset(), {}, self._format(0))
        if chosen.cost.peak_bytes <= allowed_bytes:
            return chosen
        program = self._program
        program.loosen()
        self._learn(program, chosen, above_bytes=allowed_bytes)
        best, clock, too_large = None, _Clock(max_seconds), set[int]()
        for _ in range(MAX_TRIES):
            found = self._fitting(program, allowed_bytes, clock, too_large, is_first=best is None)
            if found is None:
                break
            found = self._without_waiting(found, allowed_bytes)
            best = found if best is None else min(best, found, key=self._rated)
            moving = self._costs.moving(found.recomputed, found.treated)
            if clock.is_spent or moving.waiting_seconds <= LITTLE_WAITING * self._costs.profile.seconds:
                break
            program.slow_down(*moving.slowness(self._costs.profile))
        return best

    def _fitting(
        self, program: Program, allowed_bytes: int, clock: "_Clock", too_large: set[int], *, is_first: bool
    ) -> Chosen | None:
        """Solve until the choice fits, or no time is left for another than the first; note formats that never fit."""
        for _ in range(MAX_ROUNDS):
            if clock.is_spent and not is_first:
                return None
            with clock as limit_seconds:
                found = program.solve(allowed_bytes=allowed_bytes, limit_seconds=limit_seconds, without=too_large)
            if found is None:
                return None
            chosen = self._priced(found.recomputed, found.treated, self._format(found.state_format))
            if chosen.cost.peak_bytes <= allowed_bytes:
                return self.without_needless(chosen, allowed_bytes)
            if chosen.cost.at >= self._costs.profile.num_events:  # the optimiser's step: no choice lowers it
                too_large.add(found.state_format)
            elif not self._learn(program, chosen, above_bytes=allowed_bytes):
                program.tighten(chosen.cost.at, chosen.cost.peak_bytes - allowed_bytes)
        return None

    def _without_waiting(self, chosen: Chosen, allowed_bytes: int) -> Chosen:
        """Return the plan, or the same spread over equal blocks where that is faster and fits."""
        if not self._costs.moving(chosen.recomputed, chosen.treated).waiting_seconds:
            return chosen
        deals = self._spread.deals(chosen.recomputed, chosen.treated)
        spread = [self._priced(recomputed, treated, chosen.optimizer) for recomputed, treated in deals]
        fitting = [each for each in spread if each.cost.peak_bytes <= allowed_bytes]
        return min(chosen, *fitting, key=lambda each: each.cost.seconds) if fitting else chosen

    def _rated(self, chosen: Chosen) -> float:
        return chosen.rated(self._optimizers, self._plain_seconds)

    @functools.cached_property
    def _plain_seconds(self) -> float:
        return self._costs.price((), self._format(0)).seconds

    def least(self, optimizer: OptimizerCost | None) -> Chosen:
        """Find the plan with the lowest peak for a state format: states add the same to every plan."""
        least = self.lowest(optimizer)
        at_update = least.cost.at >= self._costs.profile.num_events
        return self.without_needless(least, least.cost.peak_bytes) if at_update else least

    def lowest(self, optimizer: OptimizerCost | None) -> Chosen:
        """Find the same peak, maybe with choices that are needless where the optimiser's step is above all."""
        return self._priced(*self._least_beside(optimizer.host_bytes if optimizer else 0), optimizer)

    def _format(self, number: int) -> OptimizerCost | None:
        return self._optimizers[number] if self._optimizers else None

    def _least_beside(self, taken_bytes: int) -> Choices:
        """Return the choices with the lowest peak where so much lies on the tier already."""
        link = self._costs.profile.link
        if taken_bytes and link is not None:
            chosen = self._least_beside(0)
            if self._costs.moving(*chosen).stored_bytes + taken_bytes <= link.capacity_bytes:
                return chosen
        if taken_bytes not in self._least:
            self._least[taken_bytes] = self._find_least(taken_bytes)
        return self._least[taken_bytes]

    def _find_least(self, taken_bytes: int) -> Choices:
        chosen = best = self._priced(frozenset(), {}, None)
        # A program of its own: what budgets have taught does not change the least.
        program = Program(self._costs, self._options, taken_bytes=taken_bytes)
        self._learn(program, chosen, above_bytes=chosen.cost.peak_bytes - 1)
        clock = _Clock(MAX_SECONDS)
        for _ in range(MAX_ROUNDS):
            with clock as limit_seconds:
                found = program.solve(allowed_bytes=None, limit_seconds=limit_seconds)
            if found is None:
                break
            chosen = self._priced(found.recomputed, found.treated, None)
            best = min(best, chosen, key=lambda each: (each.cost.peak_bytes, each.cost.seconds))
            if not self._learn(program, chosen, above_bytes=chosen.cost.peak_bytes - 1):
                break
        return best.recomputed, best.treated

    def _learn(self, program: Program, chosen: Chosen, *, above_bytes: int) -> bool:
        """Tell a program the events at which a choice takes too much; False where it knows all of them."""
        cost = chosen.cost
        if cost.at >= self._costs.profile.num_events:  # the optimiser's step, which no choice here lowers
            return False
        above_bytes -= _state_bytes(chosen.optimizer)
        events = {cost.at, *self._costs.peaks(chosen.recomputed, chosen.treated, above_bytes=above_bytes)}
        return any([program.add_event(event) for event in sorted(events)])

    def _priced(
        self, recomputed: frozenset[str], treated: Mapping[str, Treatment], optimizer: OptimizerCost | None
    ) -> Chosen:
        cost = self._costs.price(recomputed, optimizer, treated=treated)
        return Chosen(cost, optimizer, recomputed, treated, self._costs.window_bytes)

    def without_needless(self, chosen: Chosen, allowed_bytes: int) -> Chosen:
        """Take back what need not be chosen for a peak that is allowed: blocks, then groups, the slowest first."""
        blocks = sorted(chosen.recomputed, key=self._costs.recompute_seconds, reverse=True)
        added = itertools.starmap(self._costs.treatment_seconds, chosen.treated.items())
        groups = [name for _, name in sorted(zip(added, chosen.treated, strict=True), reverse=True)]
        for name in (*blocks[:MAX_NEEDLESS], *groups[:MAX_NEEDLESS]):
            treated = {key: at for key, at in chosen.treated.items() if key != name}
            without = self._priced(chosen.recomputed - {name}, treated, chosen.optimizer)
            chosen = without if without.cost.peak_bytes <= allowed_bytes else chosen
        return chosen


def _state_bytes(optimizer: OptimizerCost | None) -> int:
    return optimizer.state_bytes if optimizer else 0


class _Clock:
    """Counts the seconds of a search; a context returns how many its body may take."""

    def __init__(self, max_seconds: float) -> None:
        self._left_seconds, self._started = max_seconds, 0.0

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left; a search that has no plan yet goes on all the same."""
        return self._left_seconds <= 0

    def __enter__(self) -> float:
        self._started = time.perf_counter()
        return max(LEAST_SECONDS, self._left_seconds / 2)

    def __exit__(self, *exc_info: object) -> None:
        self._left_seconds -= time.perf_counter() - self._started
