"""What lives over a training step, as a record: every large storage from birth to death, by category and with its name.

torch's memory snapshot tells every block of the allocator and the stack that asked for it, megabytes of it, and neither
what a block is for nor what was expected of it. A peak divided by category tells what, and neither when nor where. Here
a step is a line of events, and what lives on it are storages with a category, a site and a line of code; predicted and
measured steps are records of one kind, so that they can be laid side by side.

A record has to be small, and still true. So storages that are a small part of the peak are gathered by category into
`Rest`s, and of a long line of events the highest and the lowest of each stretch are kept, so that

    bytes at an event = sum of the `Held` that live there + the `Rest`s' bytes there

holds to the byte at every event that is kept, and the peak always is.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from packlight.lanes import Lanes

MOST_EVENTS = 800
MOST_STORAGES = 400
"""A record has no more storages than this, and not many more events: the first of each phase is kept, too."""

SMALL_SHARE = 1 / 2000
"""Storages that are a smaller share of the peak are gathered."""


@dataclass(frozen=True)
class Phase:
    """A part of the step from `start` until before `end`: "forward", "loss", "backward", "recompute", "optimizer"."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Held:
    """A storage, from the event `born` until before `died`.

    Attributes:
        num_bytes: its size.
        born, died: events.
        category: one of `records.CATEGORIES`.
        site: what it is, or where the model made or saved it: "blocks.0.mlp:1", "gradient of head.weight".
        code: the line that made it: "model.py:41 in forward"; "" where none is known.
    """

    num_bytes: int
    born: int
    died: int
    category: str
    site: str = ""
    code: str = ""


@dataclass(frozen=True)
class Rest:
    """The storages of a category that are not told one by one: their bytes from each event of `starts` on."""

    category: str
    starts: tuple[int, ...]
    num_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """What lives over a step; all events in it are positions in `events`.

    Attributes:
        events: those that are kept, by their numbers in the whole line.
        peak: the event at which most lives.
        phases: the parts of the step, in order.
        held: the large storages, the largest first.
        rests: the others.
        step: the number of the step, from 1, where it was measured.
        lanes: what is copied meanwhile, and when; None where nothing moves, or where it was measured.
    """

    events: tuple[int, ...]
    peak: int
    phases: tuple[Phase, ...]
    held: tuple[Held, ...]
    rests: tuple[Rest, ...]
    step: int = 0
    lanes: Lanes | None = None

    @property
    def peak_bytes(self) -> int:
        """Most that lives at one event."""
        return sum(self.at(self.peak).values())

    def at(self, event: int) -> dict[str, int]:
        """Return what lives at an event, by category."""
        divided: dict[str, int] = {}
        for each in self.alive(event):
            divided[each.category] = divided.get(each.category, 0) + each.num_bytes
        for rest in self.rests:
            step = bisect_right(rest.starts, event) - 1
            if step >= 0:
                divided[rest.category] = divided.get(rest.category, 0) + rest.num_bytes[step]
        return divided

    def alive(self, event: int) -> list[Held]:
        """Return the large storages that live at an event, the largest first."""
        return [each for each in self.held if each.born <= event < each.died]

    def by_category(self) -> dict[str, list[int]]:
        """Return for each category what lives of it at each event."""
        lines: dict[str, list[int]] = {}
        for each in self.held:
            change = lines.setdefault(each.category, [0] * (len(self.events) + 1))
            change[each.born] += each.num_bytes
            change[each.died] -= each.num_bytes
        for rest in self.rests:
            change = lines.setdefault(rest.category, [0] * (len(self.events) + 1))
            for start, num_bytes, before in zip(rest.starts, rest.num_bytes, (0, *rest.num_bytes), strict=False):
                change[start] += num_bytes - before
        return {name: list(itertools.accumulate(change[:-1])) for name, change in lines.items()}

    def phase_at(self, event: int) -> str:
        """Return the name of the phase that an event is in; "" outside of all."""
        return next((phase.name for phase in self.phases if phase.start <= event < phase.end), "")


def condensed(
    lives: Iterable[Held], *, num_events: int, phases: Sequence[Phase], peak: int | None = None, step: int = 0
) -> Memory:
    """Make a record of a whole line.

    Args:
        lives: every storage on it.
        num_events: its length.
        phases: its parts.
        peak: the event at which most lives; None: the first such.
        step: the number of the step, where it was measured.

    Returns:
        The record, which is exact at every event that it keeps, and keeps the peak.
    """
    every = [each for each in lives if each.born < each.died and each.num_bytes]
    live = _live_bytes(every, num_events)
    peak = max(range(num_events), key=live.__getitem__) if peak is None else peak
    kept = _kept(live, phases, peak)
    seen = [_moved(each, kept) for each in every]
    seen = [each for each in seen if each.born < each.died]
    at = bisect_left(kept, peak)
    large = [each for each in seen if each.num_bytes >= live[peak] * SMALL_SHARE]
    large.sort(key=lambda each: (each.born <= at < each.died, each.num_bytes, each.died - each.born), reverse=True)
    told = {id(each) for each in large[:MOST_STORAGES]}
    return Memory(
        events=tuple(kept),
        peak=at,
        phases=tuple(
            Phase(each.name, bisect_left(kept, each.start), bisect_left(kept, each.end))
            for each in phases
            if each.start < each.end
        ),
        held=tuple(sorted(large[:MOST_STORAGES], key=lambda each: (-each.num_bytes, each.born))),
        rests=_rests([each for each in seen if id(each) not in told], len(kept)),
        step=step,
    )


def _live_bytes(lives: Iterable[Held], num_events: int) -> list[int]:
    change = [0] * (num_events + 1)
    for each in lives:
        change[each.born] += each.num_bytes
        change[each.died] -= each.num_bytes
    return list(itertools.accumulate(change[:-1]))


def _kept(live: Sequence[int], phases: Sequence[Phase], peak: int) -> list[int]:
    """Return the events to keep: the first of each phase, and the highest and the lowest of each stretch."""
    firsts = {phase.start for phase in phases if phase.start < phase.end}
    if len(live) <= MOST_EVENTS:
        return list(range(len(live)))
    length = -(-2 * len(live) // MOST_EVENTS)
    stretches = [range(start, min(start + length, len(live))) for start in range(0, len(live), length)]
    chosen = {pick(stretch, key=live.__getitem__) for stretch in stretches for pick in (max, min)}
    return sorted({0, peak, len(live) - 1} | firsts | chosen)


def _moved(each: Held, kept: Sequence[int]) -> Held:
    """Count a storage's events by those that are kept: it lives at just the same ones."""
    return replace(each, born=bisect_left(kept, each.born), died=bisect_left(kept, each.died))


def _rests(lives: Iterable[Held], num_events: int) -> tuple[Rest, ...]:
    by_category: dict[str, list[Held]] = {}
    for each in lives:
        by_category.setdefault(each.category, []).append(each)
    found = []
    for category, members in by_category.items():
        live = _live_bytes(members, num_events)
        starts = [at for at, num_bytes in enumerate(live) if num_bytes != (live[at - 1] if at else 0)]
        found.append(Rest(category, tuple(starts), tuple(live[at] for at in starts)))
    return tuple(found)
