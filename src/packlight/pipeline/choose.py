"""The choice of a schedule and of what moves: every candidate is simulated, and the fastest that fits is taken.

PipeOffload's rule (the largest groups that fit, then chunks to the tier, the longest held first) is good where copies
are cheap and microbatches many. With few microbatches a uniform schedule (PO) pays for its small peak with bubbles that
a grouped one with half its chunks moved does not have; with slow copies it is the other way round. So nothing is
assumed: all group sizes and PO are tried, each with every number of chunks moved.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from packlight.budget import BudgetError, format_bytes
from packlight.pipeline.copies import Copies, Tier, place
from packlight.pipeline.line import Lines
from packlight.pipeline.schedule import Schedule, ScheduleError, grouped, interleaved, one_f_one_b, uniform
from packlight.pipeline.simulate import StageCost, Timed, simulate


@dataclass(frozen=True)
class Candidate:
    """A schedule with a number of each rank's chunks moved, and what that takes.

    Attributes:
        timed: the schedule and its times.
        num_moved: chunks that are to move, from the first on: these are held longest.
        copies: by rank.
        peaks_bytes: by rank, the most that it holds, with what it holds anyway.
        busy_seconds: what copies take from compute, on the rank where that is most.
    """

    timed: Timed
    num_moved: int
    copies: tuple[Copies, ...]
    peaks_bytes: tuple[int, ...]
    busy_seconds: float = 0.0

    @property
    def name(self) -> str:
        """The schedule's, and how many chunks move."""
        schedule = self.timed.schedule
        return f"{schedule.name} + {self.num_moved}/{schedule.num_chunks}" if self.num_moved else schedule.name

    @property
    def peak_bytes(self) -> int:
        """Of the rank that holds most."""
        return max(self.peaks_bytes)

    @property
    def host_bytes(self) -> int:
        """Most on the tier of a rank."""
        return max(each.stored_bytes for each in self.copies)

    def link_use(self, tier: Tier) -> tuple[float, float]:
        """Return the share of a step in which copies run out, and back, on the rank that moves most."""
        moved_bytes = max(each.moved_bytes for each in self.copies)
        out, back = moved_bytes / tier.out_bytes_per_second, moved_bytes / tier.in_bytes_per_second
        return out / self.seconds, back / self.seconds

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.timed.seconds + self.busy_seconds


def candidates(
    shape: tuple[int, int, int],
    costs: Sequence[StageCost],
    *,
    resident_bytes: Sequence[int] = (0,),
    tier: Tier | None = None,
) -> Iterator[Candidate]:
    """Yield every schedule with every number of chunks moved.

    Args:
        shape: ranks, chunks of each, and microbatches.
        costs: by stage; one alone is for all stages.
        resident_bytes: what each rank holds besides (weights, gradients, states, buffers); one alone is for all ranks.
        tier: the way to the tier of each rank; None: nothing moves.

    Raises:
        ScheduleError: no schedule runs so many microbatches on such ranks.
    """
    num_ranks, num_chunks, _ = shape
    resident = list(resident_bytes) * (num_ranks if len(resident_bytes) == 1 else 1)
    made, errors = list[Schedule](), list[ScheduleError]()
    for make in _makers(*shape):
        try:
            made.append(make())
        except ScheduleError as error:
            errors.append(error)
    if not made:
        raise errors[0]
    for schedule in made:
        timed = simulate(schedule, costs)
        each_line = Lines(timed)
        lines = [each_line.line(rank) for rank in range(num_ranks)]
        for num_moved in range(num_chunks + 1 if tier is not None else 1):
            copies = tuple(
                place(line, range(rank, num_moved * num_ranks, num_ranks), tier) for rank, line in enumerate(lines)
            )
            peaks = tuple(each.peak_bytes + beside for each, beside in zip(copies, resident, strict=True))
            busy = (
                2 * max(each.moved_bytes for each in copies) * (tier.busy_seconds_per_byte if tier is not None else 0.0)
            )
            yield Candidate(timed, num_moved, copies, peaks, busy)


def _makers(num_ranks: int, num_chunks: int, num_microbatches: int) -> Iterator[Callable[[], Schedule]]:
    if num_chunks == 1:
        yield functools.partial(one_f_one_b, num_ranks, num_microbatches)
    else:
        yield functools.partial(interleaved, num_ranks, num_chunks, num_microbatches)
    least = math.ceil(num_ranks / 2) if num_chunks > 1 else num_ranks  # with one chunk groups are all alike
    for size in range(num_ranks, least - 1, -1):
        yield functools.partial(grouped, num_ranks, num_chunks, num_microbatches, group_size=size)
    yield functools.partial(uniform, num_ranks, num_chunks, num_microbatches)


def fastest(found: Sequence[Candidate], budget_bytes: int, host_budget_bytes: int | None = None) -> Candidate:
    """Return the fastest candidate that fits; of equally fast ones that with the fewer copies and the lower peak.

    Args:
        found: the candidates.
        budget_bytes: allowed on each rank's device.
        host_budget_bytes: allowed on each rank's tier; None for no bound.

    Raises:
        BudgetError: none fits; it names the smallest budget that one would.
    """
    allowed = within(found, host_budget_bytes)
    fitting = [each for each in allowed if each.peak_bytes <= budget_bytes]
    if not fitting:
        least = min(allowed, key=lambda each: each.peak_bytes)
        told = (
            f"no schedule fits {format_bytes(budget_bytes)} on every rank; the smallest budget that fits is "
            f"{least.peak_bytes} bytes ({format_bytes(least.peak_bytes)}), by {least.name}; "
            "or make microbatches smaller"
        )
        freer = min(found, key=lambda each: (each.peak_bytes, each.host_bytes))
        if freer.peak_bytes < least.peak_bytes and host_budget_bytes is not None:
            told += (
                f"; {format_bytes(host_budget_bytes)} on the tier of a rank are what binds: with "
                f"{format_bytes(freer.host_bytes)} there, {freer.name} takes {format_bytes(freer.peak_bytes)}"
            )
        raise BudgetError(told, smallest_bytes=least.peak_bytes)
    return min(fitting, key=lambda each: (each.seconds, each.num_moved, each.peak_bytes))


def within(found: Sequence[Candidate], host_budget_bytes: int | None) -> list[Candidate]:
    """Return the candidates that keep to a budget of each rank's tier; None for no bound."""
    return [each for each in found if host_budget_bytes is None or each.host_bytes <= host_budget_bytes]


def frontier(found: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that no other one beats in time and peak at once, the fastest first."""
    kept = list[Candidate]()
    for each in sorted(found, key=lambda each: (each.seconds, each.peak_bytes, each.num_moved)):
        if not kept or each.peak_bytes < kept[-1].peak_bytes:
            kept.append(each)
    return kept
