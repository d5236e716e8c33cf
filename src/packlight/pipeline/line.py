"""Where in a rank's order a moment falls, and how many bytes there are then: a schedule's times as arrays.

A search asks for every number of chunks on every rank of every schedule, thousands of times. So times and places of all
microbatches are put into arrays once, what a rank has without copies is summed up once, and each choice of copies adds
its own changes to that sum. Counted is the list that runs, as `whole.py` makes it; `ledger.py` defines the bytes, and
says the same action by action.

A place is that of a compute action in its rank's order; a gap is in front of the action of the same number.
"""

import functools

import numpy
from numpy.typing import NDArray

from packlight.pipeline.simulate import Timed

Key = tuple[int, int]
"""A stage and a microbatch."""
Floats = NDArray[numpy.float64]
Places = NDArray[numpy.intp]
Bytes = NDArray[numpy.int64]


class Lines:
    """The times of all ranks.

    Attributes:
        timed: the times.
        forward, used, last: place of F; of I or B; of W or B, by stage and microbatch.
        forward_end, used_start, used_end: seconds of these.
    """

    def __init__(self, timed: Timed) -> None:
        schedule, self.timed = timed.schedule, timed
        shape = schedule.num_stages, schedule.num_microbatches
        self.forward, self.used, self.last = (numpy.zeros(shape, dtype=numpy.intp) for _ in range(3))
        self.forward_end, self.used_start, self.used_end = (numpy.zeros(shape) for _ in range(3))
        self._bytes: dict[str, Bytes] = {}
        for order, starts, ends in zip(schedule.orders, timed.starts, timed.ends, strict=True):
            kinds, stages, microbatches = (numpy.array(each) for each in zip(*order, strict=True))
            begun, ended = numpy.array(starts), numpy.array(ends)
            is_forward, is_both = kinds == "F", kinds == "B"
            for wanted, place in (
                (is_forward, self.forward),
                ((kinds == "I") | is_both, self.used),
                ((kinds == "W") | is_both, self.last),
            ):
                found = wanted.nonzero()[0]
                at = stages[found], microbatches[found]
                place[at] = found
                if place is self.forward:
                    self.forward_end[at] = ended[found]
                elif place is self.used:
                    self.used_start[at], self.used_end[at] = begun[found], ended[found]

    def bytes_of(self, name: str) -> Bytes:
        """Return a number of bytes of each stage."""
        if name not in self._bytes:
            self._bytes[name] = numpy.array([getattr(cost, name) for cost in self.timed.costs], dtype=numpy.int64)
        return self._bytes[name]

    def line(self, rank: int) -> "Line":
        """Return the times of one rank."""
        return Line(self, rank)


class Line:
    """When a rank computes and holds what; its microbatches are in the order of stages, then of their numbers.

    Attributes:
        stages, microbatches: of each.
        forward, used, last: places of F; of I or B; of W or B.
        ready, due, lasting: seconds at which F has ended, and I or B begins; of the latter.
        movable: bytes that can go to a tier.
        asked, asked_back: gaps in which its input, and the gradient of its output, are awaited.
    """

    def __init__(self, lines: Lines, rank: int) -> None:
        schedule = lines.timed.schedule
        own = numpy.arange(rank, schedule.num_stages, schedule.num_ranks)
        self.stages = numpy.repeat(own, schedule.num_microbatches)
        self.microbatches = numpy.tile(numpy.arange(schedule.num_microbatches), own.size)
        self._lines, self._at = lines, (self.stages, self.microbatches)
        self._is_local = schedule.num_ranks == 1
        self._starts, self._ends = numpy.array(lines.timed.starts[rank]), numpy.array(lines.timed.ends[rank])
        self.forward, self.used, self.last = (each[self._at] for each in (lines.forward, lines.used, lines.last))
        self.ready, self.due = lines.forward_end[self._at], lines.used_start[self._at]
        self.lasting = lines.used_end[self._at] - self.due
        self.movable = lines.bytes_of("movable_bytes")[self.stages]
        self._is_first, self._is_last = self.stages == 0, self.stages == schedule.num_stages - 1
        # the first stage awaits nothing and the last one no gradient: what stands there for them is not used
        self.sent_to, self.sent_back = (
            lines.forward_end[self.stages - 1, self.microbatches],
            lines.used_end[(self.stages + 1) % schedule.num_stages, self.microbatches],
        )
        before, behind = (rank - 1) % schedule.num_ranks, (rank + 1) % schedule.num_ranks
        self.asked = numpy.minimum(self._gap_asked(self.sent_to, is_first=before < rank), self.forward)
        self.asked_back = numpy.minimum(self._gap_asked(self.sent_back, is_first=behind < rank), self.used)

    @property
    def awaits(self) -> Places:
        """Which get their input from another rank."""
        found: Places = (~self._is_first & (not self._is_local)).nonzero()[0]
        return found

    @property
    def awaits_back(self) -> Places:
        """Which get the gradient of their output from another rank."""
        found: Places = (~self._is_last & (not self._is_local)).nonzero()[0]
        return found

    def keys_of(self, places: Places) -> tuple[Key, ...]:
        """Return stage and microbatch of some."""
        return tuple(zip(self.stages[places].tolist(), self.microbatches[places].tolist(), strict=True))

    def _gap_asked(self, times: Floats, *, is_first: bool) -> Places:
        """Return the gaps in which messages sent at those times are awaited: in front of what runs then, or comes next.

        Where an action ends at that very time, and so may send, both ranks have to know which message is first: then
        a message that `is_first` is awaited in front of that action.
        """
        return numpy.searchsorted(self._ends, times, side="left") if is_first else self.gap_from(times)

    def gap_by(self, times: Floats) -> Places:
        """Return the first gap that compute comes to at a time or later."""
        return numpy.searchsorted(self._starts, times)

    def gap_from(self, times: Floats) -> Places:
        """Return the last gap that compute leaves at a time or later: what runs then, or comes next, is behind it."""
        return numpy.searchsorted(self._ends, times, side="right")

    def most_bytes(self, moved: Places, away: Places, back: Places) -> tuple[int, int]:
        """Count what there is if some are away in between.

        Args:
            moved: which.
            away: the gap in which each leaves.
            back: the gap in which each comes back.

        Returns:
            The most on the device, while an action runs, and on the tier.
        """
        size, sizes = self._ends.size + 2, self.movable[moved]
        changes, stored = numpy.zeros(size, dtype=numpy.int64), numpy.zeros(size, dtype=numpy.int64)
        numpy.subtract.at(changes, away, sizes)
        numpy.add.at(changes, back, sizes)
        early = ((away < self._sent_by[moved]) & (not self._is_local)).nonzero()[0]  # what is on its way is awaited
        numpy.subtract.at(changes, away[early], self._unheld[moved[early]])
        numpy.add.at(changes, self._sent_by[moved[early]], self._unheld[moved[early]])
        numpy.add.at(stored, self.forward[moved], sizes)
        numpy.subtract.at(stored, self.last[moved] + 1, sizes)
        return int((self._most + changes[:-1].cumsum()).max(initial=0)), int(stored.cumsum().max(initial=0))

    @functools.cached_property
    def _unheld(self) -> Bytes:
        return numpy.where(self._is_last, 0, self._lines.bytes_of("unheld_bytes")[self.stages])

    @functools.cached_property
    def _sent_by(self) -> Places:
        """The gap by which an output has been sent: the next one is, or its gradient has come back."""
        return numpy.minimum(self._following(self.forward, ~self._is_last), self.used + 1)

    def _following(self, places: Places, sends: NDArray[numpy.bool_]) -> Places:
        found = numpy.full(places.size, self._ends.size + 1)
        if not self._is_local:
            senders = sends.nonzero()[0]
            senders = senders[places[senders].argsort()]
            found[senders[:-1]] = places[senders[1:]] + 1
        return found

    @functools.cached_property
    def _most(self) -> Bytes:
        """The most while each compute action runs, and at the end, if nothing moves."""
        held, message, waiting, forward_most, input_most, weight, backward, left = (
            self._lines.bytes_of(f"{name}_bytes")[self.stages] for name in _BYTES
        )
        before = numpy.where(self._is_first, 0, self._lines.bytes_of("message_bytes")[self.stages - 1])
        handed = self._lines.bytes_of("unheld_bytes")[self.stages - 1]
        received = numpy.where(self._is_first, 0, handed) if self._is_local else before
        message, waiting = numpy.where(self._is_last, 0, message), numpy.where(self._is_first, 0, waiting)
        is_split = self.used != self.last
        gaps, changes, most = (numpy.zeros(self._ends.size + 2, dtype=numpy.int64) for _ in range(3))
        numpy.add.at(gaps, self.asked[self.awaits], received[self.awaits])
        numpy.add.at(gaps, self.asked_back[self.awaits_back], message[self.awaits_back])
        if not self._is_local:
            numpy.subtract.at(gaps, self._sent_by, self._unheld)
        forward = held + self._unheld - received
        numpy.add.at(changes, self.forward, forward)
        most[self.forward] = forward + forward_most
        # the gradient of the input lives until the next one is sent, and W needs it no more
        numpy.add.at(changes, self.used, numpy.where(is_split & self._is_first, 0, before + waiting * is_split))
        numpy.add.at(changes, self.last, left - held - message - waiting * is_split)
        if not self._is_local:
            following = self._following(self.used, ~self._is_first)
            numpy.subtract.at(gaps, numpy.maximum(following, self.last + 1), before)
        most[self.used] = numpy.where(is_split, numpy.where(self._is_first, 0, input_most), backward)
        split = is_split.nonzero()[0]
        most[self.last[split]] = numpy.where(self._is_first, backward, weight)[split]
        level = gaps.cumsum()
        level[1:] += changes[:-1].cumsum()
        return (level + numpy.maximum(numpy.maximum(most, changes), 0))[:-1]


_BYTES = ("held", "message", "waiting", "forward", "input", "weight", "backward", "left")
