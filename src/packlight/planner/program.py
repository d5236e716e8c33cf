"""The choice among plans as an integer linear program.

A peak is a maximum over events, and what lives at one event is almost a sum over choices: what is not kept is not
there. "Almost", because a storage that several blocks save, or that a recomputed block needs as its input, is there as
long as one of them wants it. The idea: one 0/1 variable for each choice, one more for each storage (of equal ones
together) that several choices have a say in, and one constraint for each event that matters. Which events matter is
not known before, so they come one by one: solve, let `cost.py` find the peak of what came out, add that event:

    live(event) = what is there anyway + kept storages + codes of encoded groups + what comes back + replays  <= budget
    least seconds = sum of what each choice adds + waiting
    waiting >= bytes moved / bandwidth - time of the pass, for forward (out) and for backward (in)

HiGHS solves it (Huangfu and Hall, Math. Prog. Comp. 10, 2018); here only the rows are written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from packlight.planner.cost import StepCost
from packlight.planner.held import Treatment, spans
from packlight.planner.moving import moved_bytes

GAP = 0.002
"""A plan may be slower than the best by this share of what the choices add."""
LIMIT_SECONDS = 5.0
"""Of one solve; the best plan so far is taken then, and still judged by `cost.py`."""

PEAK_UNIT = 2.0**20
"""The variable for the peak counts in these bytes."""
TIE = 1e-6
"""Of the choices with the lowest peak those with the fewest changes are taken."""

Option = tuple[str, Treatment]
"""A group, by name, and what may be done with it."""


@dataclass
class Row:
    """What lives at one event: a constant, and a coefficient by variable (bytes)."""

    constant: int = 0
    coefficients: dict[int, float] = field(default_factory=dict)

    def add(self, variable: int, num_bytes: float) -> None:
        """Add bytes that are there where a variable is 1."""
        self.coefficients[variable] = self.coefficients.get(variable, 0.0) + num_bytes


class Program:
    """Rows and columns for one profile.

    Args:
        costs: prices plans.
        options: what may be done with groups, each with its seconds a step.
    """

    def __init__(self, costs: StepCost, options: Mapping[Option, float]) -> None:
        self._costs, self._options = costs, list(options)
        self._blocks = costs.saving_blocks()
        self._variables = {block: at for at, block in enumerate(self._blocks)}
        self._objective = [costs.recompute_seconds(block) for block in self._blocks]
        self._by_group: dict[str, list[int]] = {}
        for name, treatment in self._options:
            self._by_group.setdefault(name, []).append(len(self._objective))
            self._objective.append(options[name, treatment])
        self._num_choices = len(self._objective)
        self._rows: dict[int, tuple[Row, list[_Link]]] = {}
        self._spans = [spans(costs.profile, costs.groups[name], treatment, ()) for name, treatment in self._options]
        self._reasons = _reasons(costs, self._variables, self._by_group)
        self._exclusions = self._exclude()
        self._moved = self._find_moved()
        # Fetched ahead, or on its way out: as much as the window holds, which is more than a group or nothing.
        self._tier_bytes = costs.window_bytes if self._moved and costs.window_bytes > 1 else 0
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
        self._rows[event][0].constant += num_bytes

    def solve(self, *, allowed_bytes: int | None) -> tuple[frozenset[str], dict[str, Treatment]] | None:
        """Find the fastest choices under which no event so far exceeds what is allowed.

        Args:
            allowed_bytes: most that may live, without optimiser states; None: find the choices whose highest event is
                lowest instead.

        Returns:
            The blocks to recompute, and what is done with groups; None where there is none, or none was found in time.
        """
        from scipy import optimize, sparse  # takes half a second, which only a plan needs

        columns, rows = self._num_choices + 3, _Rows()
        peak = self._num_choices
        for excluding in self._exclusions:
            rows.add(dict.fromkeys(excluding, 1.0), 1.0)
        for row, links in self._rows.values():
            coefficients = dict(row.coefficients)
            for link in links:
                coefficients[columns] = float(link.num_bytes)
                for terms, bound in link.lower_bounds():
                    rows.add({**terms, columns: -1.0}, bound)
                columns += 1
            coefficients[peak] = -PEAK_UNIT
            rows.add(coefficients, float(-row.constant))
        self._add_moves(rows)
        objective, upper = numpy.zeros(columns), numpy.ones(columns)
        if allowed_bytes is None:
            objective[:peak], objective[peak], upper[peak] = TIE, 1.0, numpy.inf
        else:
            objective[:peak], upper[peak] = self._objective, allowed_bytes / PEAK_UNIT
            objective[peak + 1 : peak + 3] = self._costs.profile.num_microbatches
        upper[peak + 1 : peak + 3] = numpy.inf
        integrality = numpy.zeros(columns)
        integrality[:peak] = 1
        found = optimize.milp(
            objective,
            integrality=integrality,
            bounds=optimize.Bounds(0, upper),
            constraints=optimize.LinearConstraint(rows.matrix(columns, sparse), -numpy.inf, rows.bounds),
            options={"mip_rel_gap": GAP, "time_limit": LIMIT_SECONDS},
        )
        return None if found.x is None else self._chosen(found.x)

    def _find_moved(self) -> dict[int, int]:
        """Return by variable the bytes of a group that goes to the tier."""
        groups, profile = self._costs.groups, self._costs.profile
        return {
            len(self._blocks) + at: moved_bytes(profile, groups[name], treatment)
            for at, (name, treatment) in enumerate(self._options)
            if treatment.is_moved
        }

    def _add_moves(self, rows: "_Rows") -> None:
        """Bound what lies on the tier, and the seconds that compute waits in forward and in backward."""
        profile, waiting = self._costs.profile, self._num_choices + 1
        if not self._moved or profile.link is None:
            return
        link, forward = profile.link, profile.forward_seconds
        rows.add({at: float(num_bytes) for at, num_bytes in self._moved.items()}, float(link.capacity_bytes))
        out = {at: num_bytes / link.out_bytes_per_second for at, num_bytes in self._moved.items()}
        back = {at: num_bytes / link.in_bytes_per_second for at, num_bytes in self._moved.items()}
        rows.add({**out, waiting: -1.0}, forward)
        rows.add({**back, waiting + 1: -1.0}, profile.seconds - forward)

    def _chosen(self, values: Any) -> tuple[frozenset[str], dict[str, Treatment]]:
        chosen = [at for at in range(self._num_choices) if values[at] > 0.5]
        blocks = frozenset(self._blocks[at] for at in chosen if at < len(self._blocks))
        return blocks, dict(self._options[at - len(self._blocks)] for at in chosen if at >= len(self._blocks))

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


class _Rows:
    """The constraints, as the sparse matrix that HiGHS takes."""

    def __init__(self) -> None:
        self.bounds: list[float] = []
        self._entries: tuple[list[float], list[int], list[int]] = ([], [], [])

    def add(self, coefficients: Mapping[int, float], bound: float) -> None:
        """Add `sum of coefficient * variable <= bound`, scaled so that bytes do not drown the rest."""
        scale = max((abs(value) for value in coefficients.values()), default=1.0) or 1.0
        values, rows, columns = self._entries
        for column, value in coefficients.items():
            values.append(value / scale)
            rows.append(len(self.bounds))
            columns.append(column)
        self.bounds.append(bound / scale)

    def matrix(self, num_columns: int, sparse: Any) -> Any:
        """Return the matrix, of shape (rows, columns)."""
        values, rows, columns = self._entries
        return sparse.csr_array((values, (rows, columns)), shape=(len(self.bounds), num_columns))
