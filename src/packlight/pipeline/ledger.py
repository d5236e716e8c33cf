"""What a rank has on its device after each action of a schedule, in bytes: the definition that plans and runs share.

Every byte is there from one action to another, so a list of actions says all. For stage s and microbatch m:

    RECV_F   + its input                     RECV_B   + the gradient of its output
    F        + what is held, + its output    I        + the gradient of its input, + gradients that wait for W
             - its input (if it is needed later, it is among what is held)
             - its output, if that is the last one sent
    SEND_F   - the output that was sent before       SEND_B   - the gradient that was sent before
    OFFLOAD  - what moves, - its output      RELOAD   + what moves
    W or B   - what is held, - the gradients, + what is left until the step ends

One output and one gradient of a rank are on their way at a time: a send is waited for when the next one begins, by
which time the receiver has long asked for it. torch keeps all of them until the step ends.
"""

from collections.abc import Sequence
from dataclasses import replace

from packlight.pipeline.schedule import Action, Schedule
from packlight.pipeline.simulate import StageCost

_Key = tuple[int, int]


class Ledger:
    """The bytes of one rank, action by action.

    Args:
        schedule: the schedule; without messages, none are counted.
        costs: by stage; one alone is for all stages.

    Attributes:
        live_bytes: after the last action.
        peak_bytes: the most so far, while actions ran.
    """

    def __init__(self, schedule: Schedule, costs: Sequence[StageCost]) -> None:
        self._costs = list(costs) * (schedule.num_stages if len(costs) == 1 else 1)
        self._costs[-1] = replace(self._costs[-1], message_bytes=0, unheld_bytes=0)  # nobody gets its output
        self._costs[0] = replace(self._costs[0], waiting_bytes=0)  # its I does nothing
        self._is_local = schedule.num_ranks == 1
        self._sent: _Key | None = None
        self._sent_back: _Key | None = None
        self._needed: dict[_Key, set[str]] = {}  # gradients of inputs: until when
        self.live_bytes = self.peak_bytes = 0

    def follow(self, action: Action) -> int:
        """Go on by an action, and return the bytes after it."""
        before = self.live_bytes
        change, most = getattr(self, f"_{action.kind.lower()}")((action.stage, action.microbatch))
        self.live_bytes += change
        self.peak_bytes = max(self.peak_bytes, before + most, self.live_bytes)
        return self.live_bytes

    def _received(self, stage: int) -> int:
        """Return the bytes of a stage's input; a neighbour on the same rank hands over what it has."""
        if not stage:
            return 0
        before = self._costs[stage - 1]
        return before.unheld_bytes if self._is_local else before.message_bytes

    # Each returns the change, and the most while it lasts, both above the bytes before

    def _recv_f(self, key: _Key) -> tuple[int, int]:
        return self._received(key[0]), 0

    def _f(self, key: _Key) -> tuple[int, int]:
        cost = self._costs[key[0]]
        change = cost.held_bytes + cost.unheld_bytes - self._received(key[0])
        return change, change + cost.forward_bytes

    def _send_f(self, key: _Key) -> tuple[int, int]:
        gone, self._sent = self._sent, key
        return -self._costs[gone[0]].unheld_bytes if gone is not None else 0, 0

    def _offload(self, key: _Key) -> tuple[int, int]:
        return -self._costs[key[0]].movable_bytes - self._received_by_now(key), 0

    def _reload(self, key: _Key) -> tuple[int, int]:
        return self._costs[key[0]].movable_bytes, 0

    def _recv_b(self, key: _Key) -> tuple[int, int]:
        return self._costs[key[0]].message_bytes, 0

    def _i(self, key: _Key) -> tuple[int, int]:
        gone = self._received_by_now(key)
        if not key[0]:
            return -gone, 0
        cost = self._costs[key[0]]
        self._needed[key] = {"weights", "sent"}
        return self._costs[key[0] - 1].message_bytes + cost.waiting_bytes - gone, cost.input_bytes

    def _send_b(self, key: _Key) -> tuple[int, int]:
        gone, self._sent_back = self._sent_back, key
        return -self._unneeded(gone, "sent") if gone is not None else 0, 0

    def _w(self, key: _Key) -> tuple[int, int]:
        cost = self._costs[key[0]]
        gone = cost.held_bytes + cost.message_bytes + cost.waiting_bytes + self._unneeded(key, "weights")
        return cost.left_bytes - gone, cost.weight_bytes if key[0] else cost.backward_bytes

    def _b(self, key: _Key) -> tuple[int, int]:
        cost = self._costs[key[0]]
        made = self._costs[key[0] - 1].message_bytes if key[0] else 0
        self._needed[key] = {"sent"}
        gone = cost.held_bytes + cost.message_bytes + self._received_by_now(key)
        return cost.left_bytes + made - gone, cost.backward_bytes

    def _release(self, key: _Key) -> tuple[int, int]:
        return 0, 0

    def _received_by_now(self, key: _Key) -> int:
        """Return the bytes of an output that is waited for, or has come back as a gradient, if it is the last sent."""
        if self._sent != key:
            return 0
        self._sent = None
        return self._costs[key[0]].unheld_bytes

    def _unneeded(self, key: _Key, reason: str) -> int:
        """Return the bytes of an input's gradient where this was the last reason to have it."""
        reasons = self._needed.get(key, set())
        reasons.discard(reason)
        if reasons or key not in self._needed or self._is_local:
            return 0
        del self._needed[key]
        return self._costs[key[0] - 1].message_bytes


def levels(schedule: Schedule, rank: int, costs: Sequence[StageCost]) -> list[int]:
    """Return the bytes on a rank's device after each of its actions.

    Args:
        schedule: the schedule.
        rank: the rank.
        costs: by stage; one alone is for all stages.
    """
    ledger = Ledger(schedule, costs)
    return [ledger.follow(action) for action in schedule.orders[rank]]


def peak(schedule: Schedule, rank: int, costs: Sequence[StageCost]) -> int:
    """Return the most bytes on a rank's device, while its actions run; see `levels`."""
    ledger = Ledger(schedule, costs)
    for action in schedule.orders[rank]:
        ledger.follow(action)
    return ledger.peak_bytes


def most_in_flight(schedule: Schedule, rank: int = 0) -> int:
    """Return how many microbatches' chunks a rank holds at most: its peak in chunk-activations."""
    return max(levels(schedule, rank, [StageCost(0.0, 0.0, 0.0, held_bytes=1, movable_bytes=1)]))
