"""Every schedule keeps the rules of all schedules, and holds as many microbatches as its formula says."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from packlight.pipeline.ledger import levels, most_in_flight
from packlight.pipeline.schedule import (
    Action,
    Schedule,
    ScheduleError,
    check,
    grouped,
    interleaved,
    one_f_one_b,
    stuck,
    uniform,
)
from packlight.pipeline.simulate import StageCost

pytestmark = pytest.mark.usefixtures("seed")

RANKS, CHUNKS = (1, 2, 4, 8, 16), (1, 2, 4, 8)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("num_chunks", CHUNKS)
def test_groups_hold_exactly_what_the_formula_says(num_ranks: int, num_chunks: int) -> None:
    for group_size in range(math.ceil(num_ranks / 2), num_ranks + 1):
        made = grouped(num_ranks, num_chunks, 4 * num_ranks, group_size=group_size)
        check(made)
        peaks = [most_in_flight(made, rank) for rank in range(num_ranks)]
        assert max(peaks) == peaks[0] == group_size * (num_chunks - 1) + num_ranks


@pytest.mark.parametrize("num_ranks", RANKS)
def test_1f1b_and_its_interleaved_form_hold_what_their_papers_say(num_ranks: int) -> None:
    plain = one_f_one_b(num_ranks, 4 * num_ranks)
    check(plain)
    assert [most_in_flight(plain, rank) for rank in range(num_ranks)] == list(range(num_ranks, 0, -1))
    for num_chunks in CHUNKS:
        made = interleaved(num_ranks, num_chunks, 4 * num_ranks)
        check(made)
        assert most_in_flight(made) == min(num_ranks * (num_chunks + 1) - 1, 4 * num_ranks * num_chunks)


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("num_chunks", [2, 4, 8])
def test_po_with_half_its_chunks_away_holds_what_its_paper_says(num_ranks: int, num_chunks: int) -> None:
    """(v + 2) d / 8 chunk-activations on average, at most one more where whole ones overlap (with two ranks 1.5)."""
    made = uniform(num_ranks, num_chunks, 4 * num_ranks)
    check(made)
    costs = [
        StageCost(0.0, 0.0, 0.0, held_bytes=int(stage // num_ranks >= num_chunks // 2))
        for stage in range(made.num_stages)
    ]
    peak, formula = max(levels(made, 0, costs)), (num_chunks + 2) * num_ranks / 8
    assert formula <= peak <= formula + (1.5 if num_ranks == 2 else 1)


def random_schedule() -> Schedule | None:
    """A schedule of a random shape, or none where its rule refuses it."""
    num_ranks, num_chunks, num = random.randint(1, 12), random.randint(1, 5), random.randint(1, 40)
    try:
        match random.randrange(4):
            case 0:
                return one_f_one_b(num_ranks, num)
            case 1:
                return interleaved(num_ranks, num_chunks, num)
            case 2:
                size = random.randint(math.ceil(num_ranks / 2), num_ranks)
                return grouped(num_ranks, num_chunks, num, group_size=size)
        return uniform(num_ranks, num_chunks, num)
    except ScheduleError:
        return None


def test_whatever_a_rule_makes_is_valid() -> None:
    made = [schedule for _ in range(300) if (schedule := random_schedule()) is not None]
    assert len(made) > 200
    for schedule in made:
        check(schedule)


def broken(schedule: Schedule) -> Schedule:
    """The schedule with one rule broken: an action lost, done twice, on another rank, or before what it needs."""
    orders = [list(order) for order in schedule.orders]
    rank = random.randrange(len(orders))
    place = random.randrange(len(orders[rank]))
    action = orders[rank][place]
    match random.randrange(4):
        case 0:
            del orders[rank][place]
        case 1:
            orders[rank].insert(place, action)
        case 2:
            orders[rank][place] = action._replace(stage=action.stage + 1)
        case 3:
            forward = orders[rank].index(Action("F", action.stage, action.microbatch))
            orders[rank].append(orders[rank].pop(forward))
    return replace(schedule, orders=tuple(map(tuple, orders)))


def test_a_broken_rule_is_found() -> None:
    for _ in range(200):
        schedule = random_schedule()
        if schedule is not None:
            with pytest.raises(ScheduleError):
                check(broken(schedule))


def test_a_rank_that_waits_for_ever_is_named() -> None:
    made = grouped(2, 2, 4, group_size=2)
    first = list(made.orders[0])
    backward = next(place for place, action in enumerate(first) if action.kind == "I")
    moved = (first[backward], *first[:backward], *first[backward + 1 :])
    waiting = replace(made, orders=(moved, made.orders[1]))
    assert stuck(waiting)[0] == first[backward]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: grouped(8, 4, 32, group_size=3), "group_size=3 came; wanted 4 to 8 for 8 ranks; the nearest is 4"),
        (lambda: grouped(8, 4, 32, group_size=9), "the nearest is 8"),
        (lambda: grouped(8, 3, 9, group_size=4), "cannot run 9 microbatches.*the nearest is 8 or"),
        (lambda: interleaved(4, 3, 5), "cannot run 5 microbatches.*the nearest is 4 or"),
        (lambda: uniform(0, 1, 1), "0 ranks came; wanted 1 or more"),
        (lambda: uniform(1, 1, 0), "0 microbatches came"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_nearest_that_can(make: Callable[[], Schedule], said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        make()


def test_what_is_away_is_not_held() -> None:
    order = tuple(Action(kind, 0, 0) for kind in ("F", "OFFLOAD", "RELOAD", "B", "RELEASE"))
    moved = Schedule("by hand", 1, 1, 1, (order,))
    check(moved)
    assert levels(moved, 0, [StageCost(0.0, 0.0, 0.0, held_bytes=10, movable_bytes=8)]) == [10, 2, 10, 0, 0]
    for wrong in (order[:2] + order[3:], (order[0], order[2], order[1], *order[3:]), (*order[:3], order[4], order[3])):
        with pytest.raises(ScheduleError):
            check(replace(moved, orders=(wrong,)))
