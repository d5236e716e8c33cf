"""The choice among plans as an integer linear program.

A peak is a maximum over events, and what lives at one event is almost a sum over choices: what is not kept is not
there. "Almost", because a storage that several blocks save, or that a recomputed block needs as its input, is there as
long as one of them wants it. The idea: one 0/1 variable for each choice, one more for each storage (of equal ones
together) that several choices have a say in, and one constraint for each event that matters. Which events matter is
not known before, so they come one by one: solve, let `cost.py` find the peak of what came out, add that event:

    live(event) = what is there anyway + kept storages + codes of encoded groups + what comes back + replays  <= peak
    peak + bytes of the states in the chosen format <= budget
    least seconds = sum of what each choice adds + waiting + a share of the step for what is lossy
    waiting >= slowness x bytes moved / bandwidth - time of the pass, for forward (out) and for backward (in)

HiGHS solves it (Huangfu and Hall, Math. Prog. Comp. 10, 2018); here only the rows are written.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from packlight.planner.chatter import left_out
from packlight.planner.cost import StepCost
from packlight.planner.held import Treatment, spans
from packlight.planner.moving import ONE_AT_A_TIME, moved_bytes
from packlight.planner.rows import Row, Rows
from packlight.step import OptimizerCost

GAP = 0.02
"""A plan may be slower than the best by this share of what the choices add."""
PEAK_GAP = 0.001
"""The lowest peak may be above the best by this share."""

LOSS_SHARE = 0.005
"""What is lossy (codes, and each state format over the one before) has to spare this share of a step's time."""

PEAK_UNIT = 2.0**20
"""The variable for the peak counts in these bytes."""
TIE = 1e-6
"""Of the choices with the lowest peak those with the fewest changes are taken."""

Option = tuple[str, Treatment]
"""A group, by name, and what may be done with it."""


def rated(slowdown: float, number: float) -> float:
    """Return a slowdown by which plans are compared: each of a number of things has to spare a share of the time."""
    return max(1.0, slowdown) + LOSS_SHARE * number


def lossiness(optimizers: Sequence[OptimizerCost]) -> list[int]:
    """Number state formats, the least lossy first; states in host memory lose no more, but take something of it."""
    own = list(dict.fromkeys(cost.own_format for cost in optimizers))
    return [own.index(cost.own_format) + bool(cost.host_bytes) for cost in optimizers]


@dataclass(frozen=True)
class Found:
    """Blocks to recompute, what is done with groups, and which of the state formats is taken, by position."""

    recomputed: frozenset[str]
    treated: dict[str, Treatment]
    state_format: int


class Program:
    """Rows and columns for one profile.

    Args:
        costs: prices plans.
        options: what may be done with groups, each with its seconds a step.
        optimizers: the formats that states may have, the least lossy first; none where there is no optimiser.
        taken_bytes: what else lies on the tier.
    """

    def __init__(
        self,
        costs: StepCost,
        options: Mapping[Option, float],
        optimizers: Sequence[OptimizerCost] = (),
        *,
        taken_bytes: int = 0,
    ) -> None:
        self._costs, self._options, self._optimizers = costs, list(options), optimizers
        self._taken_bytes = taken_bytes
        self._blocks = costs.saving_blocks()
        self._variables = {block: at for at, block in enumerate(self._blocks)}
        self._objective = [costs.recompute_seconds(block) for block in self._blocks]
        self._by_group: dict[str, list[int]] = {}
        for name, treatment in self._options:
            self._by_group.setdefault(name, []).append(len(self._objective))
            self._objective.append(options[name, treatment])
        self._num_choices = len(self._objective)
        lossy = (treatment.is_lossy for _, treatment in self._options)
        self._lossy = [len(self._blocks) + at for at, is_lossy in enumerate(lossy) if is_lossy]
        self._rows: dict[int, tuple[Row, list[_Link]]] = {}
        self._missing_bytes: dict[int, int] = {}
        self._spans = [spans(costs.profile, costs.groups[name], treatment, ()) for name, treatment in self._options]
        self._reasons = _reasons(costs, self._variables, self._by_group)
        self._exclusions = self._exclude()
        self._moved = self._find_moved()
        self._slowness = (1.0, 1.0)
        # Fetched ahead, or on its way out: as much as the window holds, which is more than a group or nothing.
        self._tier_bytes = costs.window_bytes if self._moved and costs.window_bytes > ONE_AT_A_TIME else 0
        self._tier_bytes += costs.staging_bytes(dict(self._options))

    def add_event(self, event: int) -> bool:
        """Ask for room at an event.

        Args:
            event: of the profile.

        Returns:
            False where the event has its row already.
        """
        if event in self._rows:
            return False
        self._rows[event] = self._row(event)
        return True

    def tighten(self, event: int, num_bytes: int) -> None:
        """Count bytes more at an event, because `cost.py` found more there than its row has."""
        self._missing_bytes[event] = self._missing_bytes.get(event, 0) + num_bytes

    def loosen(self) -> None:
        """Forget what was counted more: it was of one choice, and another search makes others."""
        self._missing_bytes.clear()
        self._slowness = (1.0, 1.0)

    def slow_down(self, out: float, back: float) -> None:
        """Count copies so many times slower than the link, because `moving.py` found its queues idle at times.

        What was counted more for the choice before is forgotten.
        """
        self._missing_bytes.clear()
        self._slowness = out, back

    def solve(
        self, *, allowed_bytes: int | None, limit_seconds: float, without: Collection[int] = ()
    ) -> "Found | None":
        """Find the fastest choices under which no event so far exceeds what is allowed.

        Args:
            allowed_bytes: most that may live; None: find the choices whose highest event is lowest instead, whatever
                the states take.
            limit_seconds: the best choices by then are taken, and still judged by `cost.py`.
            without: state formats that are out of the question.

        Returns:
            The choices; None where there are none, or none were found in time.
        """
        from scipy import optimize, sparse  # takes half a second, which only a plan needs

        at, rows = self._columns(), Rows()
        columns = at.end
        for excluding in self._exclusions:
            rows.add(dict.fromkeys(excluding, 1.0), 1.0)
        for variable in self._lossy:
            rows.add({variable: 1.0, at.any_lossy: -1.0}, 0.0)
        treating = dict.fromkeys(range(len(self._blocks), self._num_choices), 1.0)
        rows.add({**treating, at.any_treated: -float(len(treating))}, 0.0)
        for event, (row, links) in self._rows.items():
            coefficients = dict(row.coefficients)
            for link in links:
                coefficients[columns] = float(link.num_bytes)
                for terms, bound in link.lower_bounds():
                    rows.add({**terms, columns: -1.0}, bound)
                columns += 1
            coefficients[at.peak] = -PEAK_UNIT
            rows.add(coefficients, float(-row.constant - self._missing_bytes.get(event, 0)))
        self._add_moves(rows, at)
        objective, upper = numpy.zeros(columns), numpy.ones(columns)
        upper[[at.peak, *at.waiting]] = numpy.inf
        if allowed_bytes is None:
            objective[: at.peak], objective[at.peak] = TIE, 1.0
        else:
            self._weigh(objective, at)
            self._add_states(rows, at, allowed_bytes)
            upper[[at.formats[each] for each in without]] = 0
        integrality = numpy.zeros(columns)
        integrality[[*range(at.peak), at.any_lossy, at.any_treated, *at.formats]] = 1
        with left_out(b"HighsMipSolverData::"):
            found = optimize.milp(
                objective,
                integrality=integrality,
                bounds=optimize.Bounds(0, upper),
                constraints=optimize.LinearConstraint(rows.matrix(columns, sparse), -numpy.inf, rows.bounds),
                options={"mip_rel_gap": PEAK_GAP if allowed_bytes is None else GAP, "time_limit": limit_seconds},
            )
        return None if found.x is None else self._found(found.x, at)

    def _columns(self) -> "_Columns":
        peak = self._num_choices
        formats = range(peak + 5, peak + 5 + len(self._optimizers))
        return _Columns(peak, (peak + 1, peak + 2), peak + 3, peak + 4, formats)

    def _weigh(self, objective: Any, at: "_Columns") -> None:
        """Say what each variable adds to a step, in seconds; a lossy format is not taken for its speed alone."""
        profile = self._costs.profile
        objective[: at.peak] = self._objective
        objective[list(at.waiting)] = profile.num_microbatches
        loss_seconds = LOSS_SHARE * profile.seconds * profile.num_microbatches
        objective[at.any_lossy] = loss_seconds
        objective[at.any_treated] = profile.hook_seconds
        numbers = lossiness(self._optimizers)
        for number, column, optimizer in zip(numbers, at.formats, self._optimizers, strict=True):
            slower_seconds = max(0.0, profile.update_seconds(optimizer) - profile.update_seconds(self._optimizers[0]))
            objective[column] = slower_seconds + number * loss_seconds

    def _add_states(self, rows: Rows, at: "_Columns", allowed_bytes: int) -> None:
        """Choose one state format, and hold peak and states together against what is allowed."""
        states = dict(zip(at.formats, (each.state_bytes for each in self._optimizers), strict=True))
        rows.add({at.peak: PEAK_UNIT, **states}, float(allowed_bytes))
        if states:
            rows.add(dict.fromkeys(states, -1.0), -1.0)

    def _find_moved(self) -> dict[int, int]:
        """Return by variable the bytes of a group that goes to the tier."""
        groups, profile = self._costs.groups, self._costs.profile
        return {
            len(self._blocks) + at: moved_bytes(profile, groups[name], treatment)
            for at, (name, treatment) in enumerate(self._options)
            if treatment.is_moved
        }

    def _add_moves(self, rows: Rows, at: "_Columns") -> None:
        """Bound what lies on the tier, and the seconds that compute waits in forward and in backward."""
        profile = self._costs.profile
        if not self._moved or profile.link is None:
            return
        link, forward = profile.link, profile.forward_seconds
        stored = {column: float(num_bytes) for column, num_bytes in self._moved.items()}
        stored |= {column: float(each.host_bytes) for column, each in zip(at.formats, self._optimizers, strict=True)}
        rows.add(stored, float(link.capacity_bytes - self._taken_bytes))
        passes = (forward, profile.seconds - forward)
        rates = (link.out_bytes_per_second, link.in_bytes_per_second)
        for waiting, seconds, rate, slowness in zip(at.waiting, passes, rates, self._slowness, strict=True):
            copying = {column: slowness * num_bytes / rate for column, num_bytes in self._moved.items()}
            rows.add({**copying, waiting: -1.0}, seconds)

    def _found(self, values: Any, at: "_Columns") -> "Found":
        chosen = [column for column in range(at.peak) if values[column] > 0.5]
        num_blocks = len(self._blocks)
        return Found(
            recomputed=frozenset(self._blocks[column] for column in chosen if column < num_blocks),
            treated=dict(self._options[column - num_blocks] for column in chosen if column >= num_blocks),
            state_format=next((number for number, column in enumerate(at.formats) if values[column] > 0.5), 0),
        )

    def _exclude(self) -> list[tuple[int, ...]]:
        """Return choices of which one may be made: all of a group, and those with its block's recomputation."""
        found: list[tuple[int, ...]] = []
        for name, variables in self._by_group.items():
            blocks = [block for block in self._costs.blocks_of(self._costs.groups[name]) if block in self._variables]
            found += [(*variables, self._variables[block]) for block in blocks]
            if not blocks and len(variables) > 1:
                found.append(tuple(variables))
        return found

    def _row(self, event: int) -> tuple[Row, list["_Link"]]:
        row = Row(self._costs.constant_bytes(event) + self._tier_bytes)
        links: dict[Any, _Link] = {}
        for index in self._costs.alive_by_choice(event):
            self._add_storage(row, links, index, event)
        for replay in self._costs.replays:
            variable = self._variables.get(replay.region.block)
            if variable is not None:
                row.add(variable, self._costs.replay_bytes(replay, event))
        for at, found in enumerate(self._spans):
            num_bytes = sum(size for size, start, end in found if start <= event < end)
            if num_bytes:
                row.add(len(self._blocks) + at, num_bytes)
        return row, list(links.values())

    def _add_storage(self, row: Row, links: dict[Any, "_Link"], index: int, event: int) -> None:
        """Add a storage that is past its natural death, and there for the reasons that reach beyond the event."""
        num_bytes = self._costs.profile.storages[index].num_bytes
        reasons = frozenset(reason for reason, end in self._reasons.get(index, ()) if end > event)
        if any(not reason.absent and reason.present is None for reason in reasons):
            row.constant += num_bytes
        elif len(reasons) == 1:
            (reason,) = reasons
            if reason.present is not None:
                row.add(reason.present, num_bytes)
            else:
                row.constant += num_bytes
                for variable in reason.absent:
                    row.add(variable, -num_bytes)
        elif reasons:
            link = links.setdefault(reasons, _Link(reasons))
            link.num_bytes += num_bytes


@dataclass(frozen=True)
class _Columns:
    """Where the variables stand that are neither a choice (these come first) nor a storage (last)."""

    peak: int
    waiting: tuple[int, int]
    any_lossy: int
    any_treated: int
    formats: range

    @property
    def end(self) -> int:
        """The first after them."""
        return self.formats.stop


@dataclass(frozen=True)
class _Reason:
    """Why a storage is there: none of some choices was made, which exclude each other, or a block is recomputed."""

    absent: tuple[int, ...] = ()
    present: int | None = None


@dataclass
class _Link:
    """Storages that are there as soon as one of several reasons holds; they get a variable of their own."""

    reasons: frozenset[_Reason]
    num_bytes: int = 0

    def lower_bounds(self) -> list[tuple[dict[int, float], float]]:
        """Return terms and bound of `terms - variable <= bound` for each reason."""
        return [
            ({reason.present: 1.0}, 0.0) if reason.present is not None else (dict.fromkeys(reason.absent, -1.0), -1.0)
            for reason in self.reasons
        ]


def _reasons(
    costs: StepCost, blocks: Mapping[str, int], groups: Mapping[str, Sequence[int]]
) -> dict[int, list[tuple[_Reason, int]]]:
    """Return, by storage, why it is there after its natural death, and until which event."""
    found: dict[int, list[tuple[_Reason, int]]] = {}
    group_of = {save: name for name in groups for save in costs.groups[name].saves}
    for at, save in enumerate(costs.profile.saves):
        block = costs.block_of(save)
        own = () if block is None or block not in blocks else (blocks[block],)
        absent = (*own, *groups.get(group_of.get(at, ""), ()))
        found.setdefault(save.storage, []).append((_Reason(absent), save.released))
    for replay in costs.replays:
        variable = blocks.get(replay.region.block)
        if variable is not None:
            for index in replay.region.inputs:
                found.setdefault(index, []).append((_Reason(present=variable), replay.region.released))
    return found
