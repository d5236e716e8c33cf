"""Whole schedules: messages between ranks, and copies to a tier, as actions between what is computed.

What runs is a list, and so the bytes that a plan promises are counted on the list that runs (`ledger.py`). A message or
a copy is put where the simulation says that it is due:

    SEND     behind what it sends
    RECV     in front of the action that runs, or comes next, when the sender is through
    OFFLOAD  in front of the first action that begins when the way out has ended, so that it need not wait
    RELOAD   in front of the action in which the way back begins; RELEASE behind the last use

Between two actions of compute, what frees bytes comes first. No order of this kind can make ranks wait for each other:
times are one order of all actions of all ranks, and each waits for earlier ones alone. NCCL has one queue for both ways
between two ranks, so messages of the same moment have an order, too: the lower rank's is first (`Line.asked`).
"""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from packlight.pipeline.copies import Copies
from packlight.pipeline.line import Line, Lines
from packlight.pipeline.schedule import COPIES, MESSAGES, Action, Schedule, ScheduleError, check, needs, refuse_waits
from packlight.pipeline.simulate import StageCost, Timed, simulate
from packlight.schedules import Pipeline


def whole(timed: Timed, copies: Sequence[Copies] = ()) -> Schedule:
    """Put messages and copies into a schedule.

    Args:
        timed: what is computed, and when.
        copies: of each rank; none: nothing moves.

    Returns:
        The schedule as each rank carries it out.
    """
    lines, orders = Lines(timed), list[tuple[Action, ...]]()
    for rank, order in enumerate(timed.schedule.orders):
        between: dict[int, list[Action]] = {}
        for gap, message in _messages(lines.line(rank), order, timed.schedule):
            between.setdefault(gap, []).append(message)
        for key, gaps in copies[rank].gaps().items() if copies else ():
            for kind, gap in zip(COPIES, gaps, strict=True):
                between.setdefault(gap, []).append(Action(kind, *key))
        made = list[Action]()
        for gap in range(len(order) + 1):
            made += sorted(between.get(gap, ()), key=lambda each: _RANKING[each.kind])
            made += order[gap : gap + 1]
        orders.append(tuple(made))
    return replace(timed.schedule, orders=tuple(orders))


def whole_of(schedule: Schedule) -> Schedule:
    """Return a schedule with its messages, each action taking as long as every other one where it has none yet."""
    return schedule if schedule.is_whole else whole(simulate(schedule, [StageCost(1.0, 1.0, 1.0)]))


def written(schedule: Schedule) -> tuple[str, ...]:
    """Write what each rank does in a line; `read` is the way back."""
    return tuple(" ".join(map(str, order)) for order in schedule.orders)


def read(pipeline: Pipeline) -> Schedule:
    """Return the schedule that a plan's record holds.

    Raises:
        ScheduleError: there is none in it, or what there is breaks a rule.
    """
    orders = list[tuple[Action, ...]]()
    for line in pipeline.orders:
        matches = [re.fullmatch(r"(\d+)([FIWB]|[A-Z]{2,}(?:_[FB])?)(\d+)", each) for each in line.split()]
        if not all(matches):
            raise ScheduleError(f"{line[:60]!r} came; wanted actions such as 0F0, 0SEND_F0 or 0OFFLOAD0")
        orders.append(tuple(Action(each[2], int(each[1]), int(each[3])) for each in matches if each is not None))
    if len(orders) != pipeline.num_ranks:
        raise ScheduleError(f"the plan has orders for {len(orders)} of {pipeline.num_ranks} ranks; make it anew")
    shape = pipeline.num_ranks, pipeline.num_chunks, pipeline.num_microbatches
    schedule = Schedule(pipeline.schedule, *shape, tuple(orders))
    check_messages(schedule)
    return schedule


_RANKING = {"SEND_F": 0, "SEND_B": 0, "RELEASE": 1, "OFFLOAD": 2, "RECV_F": 3, "RECV_B": 3, "RELOAD": 4}
"""Others wait for what is sent; then what frees bytes, then what takes some."""


def _messages(line: Line, order: Sequence[Action], schedule: Schedule) -> Iterator[tuple[int, Action]]:
    """Yield the messages of a rank and their gaps: what it sends, and what it awaits, in the order of sending."""
    if schedule.num_ranks == 1:
        return
    for place, (kind, stage, at) in enumerate(order):
        if kind == "F" and stage < schedule.num_stages - 1:
            yield place + 1, Action("SEND_F", stage, at)
        elif kind in ("I", "B") and stage:
            yield place + 1, Action("SEND_B", stage, at)
    awaited = list[tuple[float, int, Action]]()
    for kind, found, sent, asked in (
        ("RECV_F", line.awaits, line.sent_to, line.asked),
        ("RECV_B", line.awaits_back, line.sent_back, line.asked_back),
    ):
        each = zip(sent[found].tolist(), asked[found].tolist(), line.keys_of(found), strict=True)
        awaited += [(time, gap, Action(kind, *key)) for time, gap, key in each]
    for _, gap, message in sorted(awaited):
        yield gap, message


def check_messages(schedule: Schedule) -> None:
    """Hold a whole schedule against the rules of messages.

    What one stage makes for another on another rank is sent once and received once. Two ranks have their messages to
    and from each other in one order: NCCL has one queue for both ways. A send waits for the one before it of its kind;
    nobody may wait for ever.

    Raises:
        ScheduleError: a rule is broken, of these or of every schedule (`schedule.check`).
    """
    check(schedule)
    wanted = [list[Action]() for _ in schedule.orders]
    if schedule.num_ranks > 1:
        for rank, order in enumerate(schedule.orders):
            for action in order:
                needed = needs(action, schedule.num_stages)
                if needed is None:
                    continue
                kind = "F" if action.kind == "F" else "B"
                wanted[rank].append(Action(f"RECV_{kind}", action.stage, action.microbatch))
                wanted[needed.stage % schedule.num_ranks].append(
                    Action(f"SEND_{kind}", needed.stage, needed.microbatch)
                )
    for rank, order in enumerate(schedule.orders):
        found = [action for action in order if action.kind in MESSAGES]
        if sorted(found) != sorted(wanted[rank]):
            odd = sorted(set(found) ^ set(wanted[rank]))
            raise ScheduleError(f"rank {rank} has messages that nobody sends or awaits, or lacks some: {odd[:4]}")
    queues = _queues(schedule)
    for (rank, other), queue in queues.items():
        if queue != queues[other, rank]:
            raise ScheduleError(f"rank {rank} and rank {other} have their messages to each other in different orders")
    refuse_waits(_Messages(schedule, queues).waiting())


def received(sent: Action) -> Action:
    """Return the action that a message is awaited by."""
    kind = sent.kind[-1]
    return Action(f"RECV_{kind}", sent.stage + (1 if kind == "F" else -1), sent.microbatch)


def _sent(message: Action) -> Action:
    """Return the action that sends a message, of that or of the one that awaits it."""
    if message.kind.startswith("SEND"):
        return message
    kind = message.kind[-1]
    return Action(f"SEND_{kind}", message.stage - (1 if kind == "F" else -1), message.microbatch)


def _peer(message: Action, num_ranks: int) -> int:
    """Return the rank that a message goes to or comes from."""
    return (message.stage + (1 if message.kind in ("SEND_F", "RECV_B") else -1)) % num_ranks


_Queues = dict[tuple[int, int], list[Action]]


def _queues(schedule: Schedule) -> _Queues:
    """Return what each rank has to do with each other one, in its order: the actions that send."""
    found: _Queues = {(a, b): [] for a in range(schedule.num_ranks) for b in range(schedule.num_ranks) if a != b}
    for rank, order in enumerate(schedule.orders):
        for action in order:
            if action.kind in MESSAGES:
                found[rank, _peer(action, schedule.num_ranks)].append(_sent(action))
    return found


class _Messages:
    """Follows a schedule's messages: one arrives when both ranks have come to it, and all before it between them."""

    def __init__(self, schedule: Schedule, queues: _Queues) -> None:
        self._schedule, self._come = schedule, set[Action]()
        self._arrived = set[Action]()
        self._queues = {tuple(sorted(ranks)): deque(queue) for ranks, queue in queues.items()}
        self._last: list[dict[str, Action]] = [{} for _ in schedule.orders]

    def waiting(self) -> list[Action]:
        """Return the actions at which ranks wait for ever; ranks go round until nothing changes."""
        orders = self._schedule.orders
        at, goes_on = [0] * len(orders), True
        while goes_on:
            goes_on = False
            for rank, order in enumerate(orders):
                while at[rank] < len(order) and self._is_done(rank, order[at[rank]]):
                    at[rank] += 1
                    goes_on = True
        return [order[place] for order, place in zip(orders, at, strict=True) if place < len(order)]

    def _is_done(self, rank: int, action: Action) -> bool:
        if action.kind in MESSAGES:
            return self._comes_to(rank, action)
        needed = needs(action, self._schedule.num_stages)
        if needed is None or self._schedule.num_ranks == 1:
            return True
        kind = "F" if action.kind == "F" else "B"
        return Action(f"SEND_{kind}", needed.stage, needed.microbatch) in self._arrived

    def _comes_to(self, rank: int, message: Action) -> bool:
        if message.kind.startswith("SEND"):
            before = self._last[rank].get(message.kind)
            if before is not None and before not in self._arrived:
                return False
            self._last[rank][message.kind] = message
        self._come.add(message)
        queue = self._queues[tuple(sorted((rank, _peer(message, self._schedule.num_ranks))))]
        while queue and {queue[0], received(queue[0])} <= self._come:
            self._arrived.add(queue.popleft())
        return True
