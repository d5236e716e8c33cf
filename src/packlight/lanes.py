"""When groups go to a tier and come back over a step, and when compute waits for them, as a record.

The sum of all waiting says that a plan is slow, and neither where nor what for. The two queues of copies laid beside
compute, over the seconds of one forward and backward, say both:

    compute   forward | wait | forward | wait | backward | wait | backward | optimiser
    out        copy copy copy copy copy
    back                                        copy copy     copy

A record has to be small, and still true. So of long lanes neighbours are joined, which is told, and stand end to end
before the end of the last of them: bytes and seconds stay as they are, and nothing overlaps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

MOST_STRETCHES = 200
"""A record has no more of a lane's copies than this, nor of what compute waits for either lane."""


@dataclass(frozen=True)
class Stretch:
    """What a lane does for a while.

    Attributes:
        group: what is copied, or what compute waits for; of several that are joined, the first and the last.
        num_bytes: what is copied; 0 where compute waits.
        start, end: in seconds from the beginning of the model's forward.
        num_joined: so many copies, or waits, it stands for.
    """

    group: str
    num_bytes: int
    start: float
    end: float
    num_joined: int = 1


@dataclass(frozen=True)
class Lanes:
    """What is copied when over one forward and backward, as it is predicted.

    Attributes:
        out, back: copies to the tier and from it, each lane in its order; a group may come back several times.
        waits_out, waits_back: when compute waits: in forward for room on the way out, in backward for what comes back.
        forward_end, backward_end: when these end, with all waiting; the loss is counted as a part of backward.
        update_seconds: what the optimiser's step takes, copies of states in host memory included.
        unplaced_seconds: what computing again, encoding and copying take of compute besides, in the whole step; the
            queues are followed without it.
        num_microbatches: so many times a step does all this but for the optimiser's step.
    """

    out: tuple[Stretch, ...]
    back: tuple[Stretch, ...]
    waits_out: tuple[Stretch, ...]
    waits_back: tuple[Stretch, ...]
    forward_end: float
    backward_end: float
    update_seconds: float
    unplaced_seconds: float
    num_microbatches: int = 1

    @property
    def end(self) -> float:
        """When the optimiser's step ends, if it follows this backward."""
        return self.backward_end + self.update_seconds

    def compute(self) -> Iterator[tuple[str, float, float]]:
        """Yield what compute does between its waits: "forward", "backward" or "optimizer", from when to when."""
        now = 0.0
        for name, waits, end in (
            ("forward", self.waits_out, self.forward_end),
            ("backward", self.waits_back, self.backward_end),
            ("optimizer", (), self.end),
        ):
            for wait in waits:
                if now < wait.start:
                    yield name, now, wait.start
                now = wait.end
            if now < end:
                yield name, now, end
            now = end

    def scaled(self, factor: float) -> "Lanes":
        """Return the same with all seconds times a factor."""
        return replace(
            self,
            out=_scaled(self.out, factor),
            back=_scaled(self.back, factor),
            waits_out=_scaled(self.waits_out, factor),
            waits_back=_scaled(self.waits_back, factor),
            forward_end=self.forward_end * factor,
            backward_end=self.backward_end * factor,
            update_seconds=self.update_seconds * factor,
            unplaced_seconds=self.unplaced_seconds * factor,
        )


def _scaled(lane: Sequence[Stretch], factor: float) -> tuple[Stretch, ...]:
    return tuple(replace(each, start=each.start * factor, end=each.end * factor) for each in lane)


def seconds_of(lane: Sequence[Stretch]) -> float:
    """Return how long a lane is busy, or compute waits."""
    return sum(each.end - each.start for each in lane)


def joined(lane: Sequence[Stretch]) -> tuple[Stretch, ...]:
    """Join neighbours of a lane, equally many each, where it has more than a record should have.

    Args:
        lane: in its order; nothing in it overlaps.

    Returns:
        At most `MOST_STRETCHES`, of the same bytes and seconds.
    """
    length = -(-len(lane) // MOST_STRETCHES) or 1
    return tuple(_one(lane[at : at + length]) for at in range(0, len(lane), length))


def _one(members: Sequence[Stretch]) -> Stretch:
    first, last = members[0], members[-1]
    if first is last:
        return first
    return Stretch(
        group=f"{first.group} to {last.group}",
        num_bytes=sum(each.num_bytes for each in members),
        start=max(first.start, last.end - seconds_of(members)),
        end=last.end,
        num_joined=sum(each.num_joined for each in members),
    )
