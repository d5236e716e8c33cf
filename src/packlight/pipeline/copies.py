"""Which microbatches move to a tier, and when: copies take the time that compute leaves, and compute never waits.

A copy that is asked for when it fits best for compute waits for others, and then compute waits for it. The idea is the
reverse: compute's times stand, and each copy gets the place in its queue that they leave it. Ways out are taken first
come, first served, from the end of a forward on. Ways back are given out from the last backward to the first, each as
late as can be and a margin before its use. A microbatch whose way out would not end before its way back begins stays
where it is.

    compute   F0 F1 F2 .......... I0 W0 ...
    out         |0|1|2|                         away: from the end of its way out
    back                      |0|               until the begin of its way back

A search asks for every number of chunks on every rank of every schedule, thousands of times; so a rank's times are put
into arrays once (`Line`), and both queues are a running maximum.
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from packlight.pipeline.simulate import Timed

Key = tuple[int, int]
"""A stage and a microbatch."""
Floats = NDArray[numpy.float64]


@dataclass(frozen=True)
class Tier:
    """The way to a tier from one rank.

    Attributes:
        out_bytes_per_second, in_bytes_per_second: while both directions are busy.
        margin: how long before its use something is back, in durations of that use.
    """

    out_bytes_per_second: float
    in_bytes_per_second: float
    margin: float = 1.0


class Copies:
    """What one rank moves.

    Attributes:
        kept: those that were to move and stay.
        peak_bytes: most that the rank holds for backward.
        stored_bytes: most that is on the tier.
    """

    def __init__(self, line: "Line", moved: NDArray[numpy.intp], kept: NDArray[numpy.intp], times: Floats) -> None:
        """Count what copies spare.

        Args:
            line: the rank's times.
            moved: which of the line's microbatches move.
            kept: which were to.
            times: (2, number of moved, 2): out and back, begin and end.
        """
        self._line, self._moved, self._times = line, moved, times
        self.kept = line.keys_of(kept)
        self.peak_bytes, self.stored_bytes = line.most_bytes(moved, times)

    @functools.cached_property
    def out(self) -> dict[Key, tuple[float, float]]:
        """Begin and end in seconds of each way out."""
        return self._by_key(0)

    @functools.cached_property
    def back(self) -> dict[Key, tuple[float, float]]:
        """Begin and end in seconds of each way back."""
        return self._by_key(1)

    def _by_key(self, way: int) -> dict[Key, tuple[float, float]]:
        spans = zip(self._line.keys_of(self._moved), self._times[way].tolist(), strict=True)
        return {key: (begin, end) for key, (begin, end) in spans}


class Line:
    """When a rank computes and holds what, by stage and microbatch.

    Args:
        timed: the times of all ranks.
        rank: this one.
    """

    def __init__(self, timed: Timed, rank: int) -> None:
        order = timed.schedule.orders[rank]
        starts, ends = numpy.array(timed.starts[rank]), numpy.array(timed.ends[rank])
        places: dict[str, dict[Key, int]] = {kind: {} for kind in "FIWB"}
        for at, (kind, stage, microbatch) in enumerate(order):
            places[kind][stage, microbatch] = at
        self._keys = list(places["F"])
        forward, used, last = (
            numpy.array([found[key] for key in self._keys], dtype=numpy.intp)
            for found in (places["F"], places["I"] | places["B"], places["W"] | places["B"])
        )
        self.stages = numpy.array([stage for stage, _ in self._keys], dtype=numpy.intp)
        self.ready, self.used, self.lasting = ends[forward], starts[used], ends[used] - starts[used]
        self.movable = numpy.array([cost.movable_bytes for cost in timed.costs], dtype=numpy.int64)[self.stages]
        held = numpy.array([cost.held_bytes for cost in timed.costs], dtype=numpy.int64)[self.stages]
        ahead = numpy.array([cost.forward_bytes for cost in timed.costs], dtype=numpy.int64)[self.stages]
        back = numpy.array([cost.backward_bytes for cost in timed.costs], dtype=numpy.int64)[self.stages]
        moments = (starts[forward], ends[forward], starts[used], ends[last])
        self._changed_at = numpy.concatenate(moments)
        self._changes = numpy.concatenate([held + ahead, -ahead, back, -held - back])

    def keys_of(self, places: NDArray[numpy.intp]) -> tuple[Key, ...]:
        """Return stage and microbatch of some."""
        return tuple(self._keys[place] for place in places.tolist())

    def most_bytes(self, moved: NDArray[numpy.intp], times: Floats) -> tuple[int, int]:
        """Return the most that is on the device and on the tier."""
        sizes, (out, back) = self.movable[moved], times
        held_at = numpy.concatenate([self._changed_at, out[:, 1], back[:, 0]])
        held = numpy.concatenate([self._changes, -sizes, sizes])
        return _most(held_at, held), _most(
            numpy.concatenate([out[:, 0], back[:, 1]]), numpy.concatenate([sizes, -sizes])
        )


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
    moved, dropped = wanted, list[NDArray[numpy.intp]]()
    while moved.size and tier is not None:
        times = _queues(line, moved, tier)
        late = (times[1, :, 0] <= times[0, :, 1]).nonzero()[0]
        if not late.size:
            return Copies(line, moved, numpy.concatenate([nothing, *dropped]), times)
        span = (line.used - line.ready)[moved[late]]  # what is held shortest spares least
        gone = late[span.argsort(kind="stable")[: max(1, late.size // 2)]]
        dropped.append(moved[gone])
        moved = numpy.delete(moved, gone)
    return Copies(line, nothing, wanted, numpy.empty((2, 0, 2)))


def _queues(line: Line, moved: NDArray[numpy.intp], tier: Tier) -> Floats:
    """Return begin and end of each way out and each way back: (2, number, 2)."""
    ready, num_bytes = line.ready[moved], line.movable[moved].astype(numpy.float64)
    due = line.used[moved] - tier.margin * line.lasting[moved]
    order, order_back = ready.argsort(kind="stable"), (-due).argsort(kind="stable")
    made = numpy.empty((2, moved.size, 2))
    made[0, order] = _first_come(ready[order], num_bytes[order] / tier.out_bytes_per_second)
    in_reverse = _first_come(-due[order_back], num_bytes[order_back] / tier.in_bytes_per_second)
    made[1, order_back] = -in_reverse[:, ::-1]  # backwards in time this is the same queue
    return made


def _first_come(ready: Floats, seconds: Floats) -> Floats:
    """Return begin and end of what is served one after another, none before it is ready."""
    before = seconds.cumsum() - seconds
    begin = numpy.maximum.accumulate(ready - before) + before
    return numpy.stack([begin, begin + seconds], axis=1)


def _most(times: Floats, changes: NDArray[numpy.int64]) -> int:
    """Return the highest sum; what goes at a moment goes before what comes."""
    if not changes.size:
        return 0
    return max(0, int(changes[numpy.lexsort((changes, times))].cumsum().max()))
