"""Which microbatches move to a tier, and when: copies take the time that compute leaves, and compute never waits.

A copy that is asked for when it fits best for compute waits for others, and then compute waits for it. The idea is the
reverse: compute's times stand, and each copy gets the place in its queue that they leave it. Ways out are taken first
come, first served, from the end of a forward on. Ways back are given out from the last backward to the first, each as
late as can be and a margin before its use. A microbatch whose way out would not end before its way back begins stays
where it is.

    compute   F0 F1 F2 .......... I0 W0 ...
    out         |0|1|2|                         away: from the first action that begins when its way out has ended
    back                      |0|               until the one that runs when its way back begins

A search asks for every number of chunks on every rank of every schedule, thousands of times; so a rank's times and
bytes are put into arrays once (`Line`), both queues are a running maximum, and bytes are a running sum. They are those
of the list that runs (`whole.py`, `ledger.py`).
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass

import numpy

from packlight.pipeline.line import Floats, Key, Line, Places


@dataclass(frozen=True)
class Tier:
    """The way to a tier from one rank.

    Attributes:
        out_bytes_per_second, in_bytes_per_second: while both directions are busy.
        margin: how long before its use something is back, in durations of that use.
        busy_seconds_per_byte: what a copy, either way, takes from compute.
    """

    out_bytes_per_second: float
    in_bytes_per_second: float
    margin: float = 1.0
    busy_seconds_per_byte: float = 0.0


class Copies:
    """What one rank moves.

    Attributes:
        kept: those that were to move and stay.
        peak_bytes: most that the rank has on its device, of what a schedule counts.
        stored_bytes: most that is on the tier.
        moved_bytes: all that goes there in a step, and comes back.
    """

    def __init__(self, line: "Line", moved: Places, kept: Places, times: Floats) -> None:
        """Count what copies spare.

        Args:
            line: the rank's times.
            moved: which of the line's microbatches move.
            kept: which were to.
            times: (2, number of moved, 2): out and back, begin and end.
        """
        self._line, self._moved, self._times = line, moved, times
        self.kept, self.moved_bytes = line.keys_of(kept), int(line.movable[moved].sum())
        self.peak_bytes, self.stored_bytes = line.most_bytes(moved, *_gaps(line, moved, times))

    @functools.cached_property
    def out(self) -> dict[Key, tuple[float, float]]:
        """Begin and end in seconds of each way out."""
        return self._by_key(0)

    @functools.cached_property
    def back(self) -> dict[Key, tuple[float, float]]:
        """Begin and end in seconds of each way back."""
        return self._by_key(1)

    def gaps(self) -> dict[Key, tuple[int, int, int]]:
        """Return in front of which of the rank's compute actions each leaves, is fetched, and is given up."""
        away, back = _gaps(self._line, self._moved, self._times)
        gaps = zip(away.tolist(), back.tolist(), (self._line.last[self._moved] + 1).tolist(), strict=True)
        return dict(zip(self._line.keys_of(self._moved), gaps, strict=True))

    def _by_key(self, way: int) -> dict[Key, tuple[float, float]]:
        spans = zip(self._line.keys_of(self._moved), self._times[way].tolist(), strict=True)
        return {key: (begin, end) for key, (begin, end) in spans}


def place(line: Line, stages: Collection[int], tier: Tier | None) -> Copies:
    """Give each copy of a rank its time.

    Args:
        line: when the rank computes.
        stages: whose microbatches are to move.
        tier: the way; None where nothing moves.

    Returns:
        The copies, and what they spare.
    """
    nothing = numpy.empty(0, dtype=numpy.intp)
    wanted = numpy.isin(line.stages, list(stages)).nonzero()[0] if tier is not None and stages else nothing
    moved, dropped = wanted, list[Places]()
    while moved.size and tier is not None:
        times = _queues(line, moved, tier)
        away, back = _gaps(line, moved, times)
        late = (back <= away).nonzero()[0]
        if not late.size:
            return Copies(line, moved, numpy.concatenate([nothing, *dropped]), times)
        span = (line.due - line.ready)[moved[late]]  # what is held shortest spares least
        gone = late[span.argsort(kind="stable")[: max(1, late.size // 2)]]
        dropped.append(moved[gone])
        moved = numpy.delete(moved, gone)
    return Copies(line, nothing, wanted, numpy.empty((2, 0, 2)))


def _queues(line: Line, moved: Places, tier: Tier) -> Floats:
    """Return begin and end of each way out and each way back: (2, number, 2)."""
    ready, num_bytes = line.ready[moved], line.movable[moved].astype(numpy.float64)
    due = line.due[moved] - tier.margin * line.lasting[moved]
    order, order_back = ready.argsort(kind="stable"), (-due).argsort(kind="stable")
    made = numpy.empty((2, moved.size, 2))
    made[0, order] = _first_come(ready[order], num_bytes[order] / tier.out_bytes_per_second)
    in_reverse = _first_come(-due[order_back], num_bytes[order_back] / tier.in_bytes_per_second)
    made[1, order_back] = -in_reverse[:, ::-1]  # backwards in time this is the same queue
    return made


def _gaps(line: Line, moved: Places, times: Floats) -> tuple[Places, Places]:
    """Return in front of which compute action each leaves, and in front of which it is fetched."""
    away = numpy.maximum(line.gap_by(times[0, :, 1]), line.forward[moved] + 1)
    return away, line.gap_from(times[1, :, 0])


def _first_come(ready: Floats, seconds: Floats) -> Floats:
    """Return begin and end of what is served one after another, none before it is ready."""
    before = seconds.cumsum() - seconds
    begin = numpy.maximum.accumulate(ready - before) + before
    return numpy.stack([begin, begin + seconds], axis=1)
