"""Searches the plan for one state format: the fastest that fits, or the one with the lowest peak.

`program.py` chooses under the events that it knows of, `cost.py` says what the choice really peaks at. Between them
goes the search: an event at which the choice takes too much becomes a constraint, until the choice fits.

    nothing is changed -> price -> fits? done
                            ^        | no: the highest peaks become rows
                            +-- solve +
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from packlight.planner.cost import Cost, StepCost
from packlight.planner.held import Treatment
from packlight.planner.program import Option, Program
from packlight.step import OptimizerCost

MAX_ROUNDS = 100
"""A search that needs more of them has found a contradiction between program and prices."""
MAX_NEEDLESS = 64
"""So many choices at most are tried without, to see whether they are needed."""


@dataclass(frozen=True)
class Chosen:
    """What is done with blocks, groups and states, through which window of a tier, and what it costs."""

    cost: Cost
    optimizer: OptimizerCost | None
    recomputed: frozenset[str] = frozenset()
    treated: Mapping[str, Treatment] = field(default_factory=dict)
    window_bytes: int = 0


class Search:
    """Plans for one profile and one state format.

    Args:
        costs: prices plans.
        optimizer: the state format; None where there is no optimiser.
        options: what may be done with groups, each with its seconds a step.
    """

    def __init__(self, costs: StepCost, optimizer: OptimizerCost | None, options: Mapping[Option, float]) -> None:
        self._costs, self._optimizer, self._options = costs, optimizer, options
        self._fixed_bytes = optimizer.state_bytes if optimizer else 0
        self._least: Chosen | None = None

    def fastest(self, allowed_bytes: int) -> Chosen | None:
        """Find the fastest plan whose peak is allowed.

        Args:
            allowed_bytes: most that may live on the device.

        Returns:
            The plan; None where there is none.
        """
        chosen = self._priced(frozenset(), {})
        if chosen.cost.peak_bytes <= allowed_bytes:
            return chosen
        least = self.least()
        if least.cost.peak_bytes > allowed_bytes:
            return None
        program = Program(self._costs, self._options)
        for _ in range(MAX_ROUNDS):
            self._learn(program, chosen, above_bytes=allowed_bytes)
            found = program.solve(allowed_bytes=allowed_bytes - self._fixed_bytes)
            if found is None:
                break
            chosen = self._priced(*found)
            if chosen.cost.peak_bytes <= allowed_bytes:
                return self._without_needless(chosen, allowed_bytes)
        return self._without_needless(least, allowed_bytes)

    def least(self) -> Chosen:
        """Find the plan with the lowest peak."""
        if self._least is None:
            self._least = self._find_least()
        return self._least

    def _find_least(self) -> Chosen:
        chosen = best = self._priced(frozenset(), {})
        program = Program(self._costs, self._options)
        for _ in range(MAX_ROUNDS):
            if not self._learn(program, chosen, above_bytes=chosen.cost.peak_bytes - 1):
                break
            found = program.solve(allowed_bytes=None)
            if found is None:
                break
            chosen = self._priced(*found)
            best = min(best, chosen, key=lambda each: (each.cost.peak_bytes, each.cost.seconds))
        return best

    def _learn(self, program: Program, chosen: Chosen, *, above_bytes: int) -> bool:
        """Add the events at which a choice takes too much; False where the program knows all of them."""
        cost = chosen.cost
        if cost.at >= self._costs.profile.num_events:  # the optimiser's step, which no choice here lowers
            return False
        above_bytes -= self._fixed_bytes
        events = {cost.at, *self._costs.peaks(chosen.recomputed, chosen.treated, above_bytes=above_bytes)}
        is_new = any([program.add_event(event) for event in sorted(events)])
        if not is_new:
            program.tighten(cost.at, cost.peak_bytes - self._fixed_bytes - above_bytes)
        return is_new

    def _priced(self, recomputed: frozenset[str], treated: Mapping[str, Treatment]) -> Chosen:
        cost = self._costs.price(recomputed, self._optimizer, treated=treated)
        return Chosen(cost, self._optimizer, recomputed, treated, self._costs.window_bytes)

    def _without_needless(self, chosen: Chosen, allowed_bytes: int) -> Chosen:
        """Take back every choice that need not be made, the slowest first."""
        blocks = sorted(chosen.recomputed, key=self._costs.recompute_seconds, reverse=True)
        for name in (*blocks[:MAX_NEEDLESS], *list(chosen.treated)[:MAX_NEEDLESS]):
            treated = {key: at for key, at in chosen.treated.items() if key != name}
            without = self._priced(chosen.recomputed - {name}, treated)
            chosen = without if without.cost.peak_bytes <= allowed_bytes else chosen
        return chosen
