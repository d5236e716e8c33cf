"""When each action of a schedule runs, and for how long ranks have nothing to do.

Published formulas for bubbles hold for equal stages and many microbatches. Here each rank walks along its own list with
the costs of its own stages: an action begins when the one before it on its rank has ended, and what it needs from
another stage has been computed and sent. A rank that has to wait is left until what it waits for is done, so each
action is looked at once or twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from packlight.pipeline.schedule import Schedule, ScheduleError, refuse_waits


@dataclass(frozen=True)
class StageCost:
    """What one microbatch takes in one stage.

    A stage's output goes to the next stage as a message, and the gradient of it comes back as one of the same size.

    Attributes:
        forward_seconds, input_seconds, weight_seconds: of F, I and W; B takes the last two, and so does the first
            stage's W: nobody waits for the gradient of a batch, so its I does nothing (as torch has it).
        held_bytes: on the device from F until W or B.
        movable_bytes: of these, what can go to a tier.
        message_bytes: of its output; 0 for the last stage.
        unheld_bytes: of its output, what is not among what is held: on the device until the output has been sent.
        waiting_bytes: gradients that I leaves for W.
        forward_bytes: most while F runs, above what there is when it has ended.
        input_bytes: most while I runs, above what there is when it begins.
        weight_bytes: most while W runs, the same.
        backward_bytes: most while B runs, or the first stage's W, the same.
        left_bytes: on the device from W or B until the step ends: a loss, say.
        hop_seconds: from the end of the stage's F until the next stage has its output, and of that one's I until this
            one has its gradient.
    """

    forward_seconds: float
    input_seconds: float
    weight_seconds: float
    held_bytes: int = 0
    movable_bytes: int = 0
    message_bytes: int = 0
    unheld_bytes: int = 0
    waiting_bytes: int = 0
    forward_bytes: int = 0
    input_bytes: int = 0
    weight_bytes: int = 0
    backward_bytes: int = 0
    left_bytes: int = 0
    hop_seconds: float = 0.0


@dataclass(frozen=True)
class Timed:
    """When the compute actions of a schedule run.

    Attributes:
        schedule: without copies.
        costs: by stage.
        starts, ends: seconds from the step's begin, by rank, in the order of its actions.
    """

    schedule: Schedule
    costs: tuple[StageCost, ...]
    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @property
    def seconds(self) -> float:
        """From the begin to the end of the last action."""
        return max(ends[-1] for ends in self.ends)

    def busy_seconds(self, rank: int) -> float:
        """Return for how long a rank computes."""
        return sum(end - start for start, end in zip(self.starts[rank], self.ends[rank], strict=True))

    @property
    def bubble(self) -> float:
        """The share of the step in which the busiest rank has nothing to do."""
        return 1 - max(map(self.busy_seconds, range(self.schedule.num_ranks))) / self.seconds


def simulate(schedule: Schedule, costs: Sequence[StageCost]) -> Timed:
    """Find out when each action runs.

    Args:
        schedule: without copies.
        costs: by stage; one alone is for all stages.

    Returns:
        The times.

    Raises:
        ScheduleError: ranks wait for each other for ever, or there are costs for another number of stages.
    """
    if len(costs) not in (1, schedule.num_stages):
        raise ScheduleError(f"costs of {len(costs)} stages came; wanted 1 or {schedule.num_stages}")
    each = tuple(costs) * (schedule.num_stages if len(costs) == 1 else 1)
    line = _Line(schedule, each)
    ready = list(range(schedule.num_ranks))
    while ready:
        ready += line.follow(ready.pop())
    ended = zip(schedule.orders, map(len, line.ends), strict=True)
    refuse_waits([order[num_ended] for order, num_ended in ended if num_ended < len(order)])
    return Timed(schedule, each, tuple(map(tuple, line.starts)), tuple(map(tuple, line.ends)))


class _Line:
    """What has been followed so far."""

    def __init__(self, schedule: Schedule, costs: Sequence[StageCost]) -> None:
        self.orders, self.last, self._num = schedule.orders, schedule.num_stages - 1, schedule.num_microbatches
        self.starts: list[list[float]] = [[] for _ in self.orders]
        self.ends: list[list[float]] = [[] for _ in self.orders]
        both = [cost.input_seconds + cost.weight_seconds for cost in costs]
        self._spans = {
            "F": [cost.forward_seconds for cost in costs],
            "I": [0.0, *(cost.input_seconds for cost in costs[1:])],
            "W": [both[0], *(cost.weight_seconds for cost in costs[1:])],
            "B": both,
        }
        hops = [cost.hop_seconds if schedule.num_ranks > 1 else 0.0 for cost in costs]
        # When what a stage sends arrives, and who waits for it, by stage and microbatch: forwards, and gradients.
        self._hops = hops, [0.0, *hops[:-1]]
        self._sent: tuple[dict[int, float], dict[int, float]] = {}, {}
        self._waiting: tuple[dict[int, int], dict[int, int]] = {}, {}

    def follow(self, rank: int) -> list[int]:
        """Go on with a rank as far as what it needs has been sent; return the ranks that waited for what it sends."""
        order, starts, ends = self.orders[rank], self.starts[rank], self.ends[rank]
        now, told, num = ends[-1] if ends else 0.0, list[int](), self._num
        for place in range(len(ends), len(order)):
            kind, stage, at = order[place]
            if kind == "W":
                starts.append(now)
                now += self._spans["W"][stage]
                ends.append(now)
                continue
            way, first, step = (0, 0, -1) if kind == "F" else (1, self.last, 1)
            if stage != first:
                needed = (stage + step) * num + at
                arrived = self._sent[way].get(needed)
                if arrived is None:
                    self._waiting[way][needed] = rank
                    break
                now = max(now, arrived)
            starts.append(now)
            now += self._spans[kind][stage]
            ends.append(now)
            key = stage * num + at
            self._sent[way][key] = now + self._hops[way][stage]
            waiting = self._waiting[way].pop(key, None)
            if waiting is not None:
                told.append(waiting)
        return told
