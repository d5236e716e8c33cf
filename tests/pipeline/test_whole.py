"""Messages and copies in a schedule: valid for any costs, in one order on both sides, with the bytes of the search."""

import itertools
import math
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest

from packlight.pipeline.copies import Copies, Tier, place
from packlight.pipeline.ledger import levels, peak
from packlight.pipeline.line import Lines
from packlight.pipeline.schedule import (
    COMPUTE,
    MESSAGES,
    Action,
    Schedule,
    ScheduleError,
    grouped,
    interleaved,
    one_f_one_b,
    uniform,
)
from packlight.pipeline.simulate import StageCost, Timed, simulate
from packlight.pipeline.whole import check_messages, read, whole, whole_of, written
from packlight.schedules import Pipeline

pytestmark = pytest.mark.usefixtures("seed")


def random_cost() -> StageCost:
    movable, message = random.randint(1, 50), random.randint(0, 9)
    return StageCost(
        random.random(),
        random.random(),
        random.random(),
        held_bytes=movable + random.randint(0, 20),
        movable_bytes=movable,
        message_bytes=message,
        unheld_bytes=random.choice((0, message)),
        waiting_bytes=random.randint(0, 5),
        forward_bytes=random.randint(0, 30),
        input_bytes=random.randint(0, 30),
        weight_bytes=random.randint(0, 30),
        backward_bytes=random.randint(0, 30),
        left_bytes=random.choice((0, 4)),
        hop_seconds=random.random() / 4,
    )


def random_ones() -> list[tuple[Timed, list[Copies]]]:
    """Schedules of every rule on ranks of uneven stages, some chunks of each rank moved over a link of any speed."""
    num_ranks, num_chunks = random.randint(1, 5), random.randint(1, 3)
    shape = num_ranks, num_chunks, num_ranks * random.randint(1, 3)
    costs = [random_cost() for _ in range(num_ranks * num_chunks)]
    size = random.randint(math.ceil(num_ranks / 2), num_ranks)
    made = []
    for schedule in (interleaved(*shape), uniform(*shape), grouped(*shape, group_size=size)):
        timed = simulate(schedule, costs)
        tier = Tier(random.uniform(5, 200), random.uniform(5, 200), margin=random.choice((0.0, 1.0)))
        lines = Lines(timed)
        copies = []
        for rank in range(num_ranks):
            moved = random.sample(range(rank, schedule.num_stages, num_ranks), random.randint(0, num_chunks))
            copies.append(place(lines.line(rank), moved, tier))
        made.append((timed, copies))
    return made


def test_whole_schedules_keep_the_rules_of_messages() -> None:
    num_moved = 0
    for _ in range(30):
        for timed, copies in random_ones():
            made = whole(timed, copies)
            check_messages(made)
            num_moved += sum(action.kind == "OFFLOAD" for order in made.orders for action in order)
            for rank, order in enumerate(timed.schedule.orders):
                assert tuple(made.computing(rank)) == order
    assert num_moved > 100


def test_a_search_counts_the_bytes_of_the_list_that_runs() -> None:
    for _ in range(60):
        for timed, copies in random_ones():
            made = whole(timed, copies)
            for rank, each in enumerate(copies):
                assert each.peak_bytes == peak(made, rank, timed.costs)


def test_after_a_step_nothing_is_there_but_what_is_on_its_way_and_what_is_left() -> None:
    for _ in range(20):
        for timed, copies in random_ones():
            made = whole(timed, copies)
            for rank, order in enumerate(made.orders):
                costs, last = timed.costs, {action.kind: action.stage for action in order}
                gradient = costs[last["SEND_B"] - 1].message_bytes if "SEND_B" in last else 0
                num_left = sum(costs[action.stage].left_bytes for action in order if action.kind in ("W", "B"))
                assert levels(made, rank, costs)[-1] == gradient + num_left


def test_the_bytes_of_a_small_pipeline_worked_by_hand() -> None:
    costs = [
        StageCost(1.0, 1.0, 1.0, 10, 8, message_bytes=2, unheld_bytes=2, forward_bytes=3, backward_bytes=5),
        StageCost(1.0, 1.0, 1.0, 20, 8, forward_bytes=1, backward_bytes=7, left_bytes=1),
    ]
    made = whole_of(one_f_one_b(2, 2))
    assert written(made) == (
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1RECV_F1 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
    )
    # F holds 10 and makes an output of 2; the first output goes when the second is sent, that one when it comes back
    assert levels(made, 0, costs) == [12, 12, 24, 22, 24, 12 - 2 + 2, 14, 0]
    # B leaves the gradient of its input (2) and a loss (1); a gradient goes when the next is sent
    assert levels(made, 1, costs) == [2, 4, 22, 5, 5, 23, 6, 4]
    assert peak(made, 1, costs) == 23 + 7


def test_copies_of_a_small_pipeline_worked_by_hand() -> None:
    """Three ranks, 1F1B; F, I and W take a second each, a hop half of one, a copy one; rank 0 waits from 3 to 9."""
    costs = [StageCost(1.0, 1.0, 1.0, 10, 8, forward_bytes=3, backward_bytes=5, hop_seconds=0.5)] * 3
    timed = simulate(one_f_one_b(3, 4), costs)
    assert timed.starts[0][:5] == (0.0, 1.0, 2.0, 9.0, 11.0)
    copies = [place(Lines(timed).line(rank), [0], Tier(8.0, 8.0, margin=0.0)) for rank in range(3)]
    first = copies[0]
    assert first.out == {(0, 0): (1.0, 2.0), (0, 1): (2.0, 3.0), (0, 2): (3.0, 4.0), (0, 3): (12.0, 13.0)}
    assert first.back == {(0, 0): (8.0, 9.0), (0, 1): (11.0, 12.0), (0, 2): (15.0, 16.0), (0, 3): (19.0, 20.0)}
    orders = written(whole(timed, copies))
    assert orders[0].startswith(
        "0F0 0SEND_F0 0F1 0SEND_F1 0OFFLOAD0 0F2 0SEND_F2 0OFFLOAD1 0OFFLOAD2 0RECV_B0 0RELOAD0 0B0 0RELEASE0 0RECV_B1 "
    )
    # the most is there while B1 runs: its own, of the third what cannot move, and the fourth, whose way out has begun
    assert first.peak_bytes == 10 + 2 + 10 + 5
    assert first.stored_bytes == 3 * 8


def messages_swapped(schedule: Schedule) -> Schedule:
    """The schedule with two messages of a rank in the other order, or one lost."""
    orders = [list(order) for order in schedule.orders]
    rank = random.randrange(len(orders))
    places = [place for place, action in enumerate(orders[rank]) if action.kind == "RECV_F"]
    if len(places) < 2:
        return messages_swapped(schedule)
    first, second = random.sample(places, 2)
    if random.random() < 0.5:
        del orders[rank][first]
    else:
        orders[rank][first], orders[rank][second] = orders[rank][second], orders[rank][first]
    return replace(schedule, orders=tuple(map(tuple, orders)))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_messages_of_one_moment_have_one_order_on_both_ranks(num_ranks: int) -> None:
    """NCCL has one queue for both ways: two ranks that both send first would wait for each other."""
    made = [one_f_one_b(num_ranks, 2 * num_ranks), uniform(num_ranks, 2, 2 * num_ranks)]
    made += [interleaved(num_ranks, 2, 2 * num_ranks), grouped(num_ranks, 2, 2 * num_ranks, group_size=num_ranks)]
    for schedule in map(whole_of, made):
        check_messages(schedule)
        swapped = 0
        for rank, order in enumerate(schedule.orders):
            for at, (one, two) in enumerate(itertools.pairwise(order)):
                if (
                    one.kind.startswith("SEND")
                    and two.kind.startswith("RECV")
                    and peer(one, num_ranks) == peer(two, num_ranks)
                ):
                    orders = list(schedule.orders)
                    orders[rank] = (*order[:at], two, one, *order[at + 2 :])
                    with pytest.raises(ScheduleError, match="in different orders"):
                        check_messages(replace(schedule, orders=tuple(orders)))
                    swapped += 1
        assert swapped or num_ranks > 2


def peer(message: Action, num_ranks: int) -> int:
    return (message.stage + (1 if message.kind in ("SEND_F", "RECV_B") else -1)) % num_ranks


def test_messages_that_are_lost_or_in_another_order_are_found() -> None:
    for _ in range(50):
        timed, copies = random.choice(random_ones())
        if timed.schedule.num_ranks > 1 and timed.schedule.num_microbatches > 1:
            with pytest.raises(ScheduleError):
                check_messages(messages_swapped(whole(timed, copies)))


def late(order: tuple[Action, ...], num_ranks: int) -> tuple[Action, ...]:
    """An order whose messages are awaited as late as can be: before they are used, or the next with that rank."""
    made = list(order)
    for at in reversed(range(len(made))):
        message = made[at]
        if message.kind.startswith("RECV"):
            end = at + 1
            while not (made[end].kind in MESSAGES and peer(made[end], num_ranks) == peer(message, num_ranks)) and not (
                made[end].kind in COMPUTE and made[end][1:] == message[1:]
            ):
                end += 1
            made.insert(end, message)
            del made[at]
    return tuple(made)


def test_a_send_that_waits_for_one_that_is_asked_for_too_late_is_found() -> None:
    """Rank 1 runs two forwards ahead of a backward, and rank 2 asks for the first only behind what hangs on that."""
    rule = grouped(3, 2, 6, group_size=3)
    for ahead, waits in ((13, False), (9, True)):
        order = list(rule.orders[1])
        order.insert(ahead, order.pop(13))
        made = whole_of(replace(rule, orders=(rule.orders[0], tuple(order), rule.orders[2])))
        check_messages(made)
        delayed = replace(made, orders=tuple(late(each, 3) for each in made.orders))
        with pytest.raises(ScheduleError, match="ranks wait for each other for ever") if waits else nullcontext():
            check_messages(delayed)


def test_orders_of_messages_that_ranks_do_not_share_are_refused_when_read() -> None:
    first = "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1"
    pipeline = Pipeline(
        "by hand", 2, 1, 2, 0, 0.0, (), (), (first, "1RECV_F1 1RECV_F0 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1")
    )
    with pytest.raises(ScheduleError, match="in different orders"):
        read(pipeline)


def test_what_is_written_is_read() -> None:
    for timed, copies in random_ones():
        made = whole(timed, copies)
        shape = made.num_ranks, made.num_chunks, made.num_microbatches
        assert read(Pipeline(made.name, *shape, 0, 0.0, (), (), written(made))) == made
        with pytest.raises(ScheduleError, match="orders for 0 of"):
            read(Pipeline(made.name, *shape, 0, 0.0, (), ()))
        with pytest.raises(ScheduleError, match="'0X0' came; wanted actions"):
            read(Pipeline(made.name, *shape, 0, 0.0, (), (), ("0X0",)))
