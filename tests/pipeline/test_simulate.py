"""Times and bytes of schedules: published formulas where these hold, and a slow simulation of its own elsewhere."""

import itertools
import math
import random

import pytest

from packlight.budget import BudgetError
from packlight.pipeline.choose import candidates, fastest
from packlight.pipeline.copies import Tier, place
from packlight.pipeline.ledger import most_in_flight
from packlight.pipeline.line import Lines
from packlight.pipeline.schedule import (
    Action,
    Schedule,
    ScheduleError,
    grouped,
    interleaved,
    one_f_one_b,
    uniform,
)
from packlight.pipeline.simulate import StageCost, simulate

pytestmark = pytest.mark.usefixtures("seed")

UNIT = StageCost(1.0, 1.0, 1.0, held_bytes=1, movable_bytes=1)


def seconds_beyond_work(schedule: Schedule) -> float:
    return simulate(schedule, [UNIT]).seconds - 3 * schedule.num_chunks * schedule.num_microbatches


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("num_chunks", [1, 2, 4, 8])
def test_bubbles_are_those_of_the_formulas(num_ranks: int, num_chunks: int) -> None:
    num = 4 * num_ranks
    if num_chunks == 1:
        assert seconds_beyond_work(one_f_one_b(num_ranks, num)) == 3 * (num_ranks - 1)
    assert seconds_beyond_work(interleaved(num_ranks, num_chunks, num)) == 3 * (num_ranks - 1)
    assert seconds_beyond_work(grouped(num_ranks, num_chunks, num, group_size=num_ranks)) == 2 * (num_ranks - 1)
    half = grouped(num_ranks, num_chunks, num, group_size=num_ranks // 2)
    assert seconds_beyond_work(half) == 2 * (num_ranks - 1) + (num_chunks - 1) * num_ranks // 2


def slow_ends(schedule: Schedule, costs: list[StageCost]) -> dict[tuple[str, int, int], float]:
    """The same by going round all ranks until nothing changes."""
    ends: dict[tuple[str, int, int], float] = {}
    at = [0] * schedule.num_ranks
    now = [0.0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(schedule.orders):
            if at[rank] == len(order):
                continue
            kind, stage, microbatch = order[at[rank]]
            needed, hop = None, 0.0
            if kind == "F" and stage:
                needed, hop = ("F", stage - 1, microbatch), costs[stage - 1].hop_seconds
            if kind in "IB" and stage < schedule.num_stages - 1:
                needed, hop = (kind, stage + 1, microbatch), costs[stage].hop_seconds
            if needed is not None and needed not in ends:
                continue
            cost = costs[stage]
            both = cost.input_seconds + cost.weight_seconds
            seconds = {
                "F": cost.forward_seconds,
                "I": cost.input_seconds if stage else 0.0,
                "W": cost.weight_seconds if stage else both,  # nobody waits for the gradient of a batch
                "B": both,
            }[kind]
            sent = 0.0 if needed is None else ends[needed] + (hop if schedule.num_ranks > 1 else 0.0)
            now[rank] = max(now[rank], sent) + seconds
            ends[kind, stage, microbatch] = now[rank]
            at[rank] += 1
            moved = True
    return ends


def test_uneven_stages_take_what_a_slow_simulation_says() -> None:
    for _ in range(20):
        num_ranks, num_chunks = random.randint(1, 5), random.randint(1, 3)
        num = num_ranks * random.randint(1, 3)
        costs = [
            StageCost(random.random(), random.random(), random.random(), hop_seconds=random.random() / 4)
            for _ in range(num_ranks * num_chunks)
        ]
        for schedule in (interleaved(num_ranks, num_chunks, num), uniform(num_ranks, num_chunks, num)):
            timed, expected = simulate(schedule, costs), slow_ends(schedule, costs)
            for order, ends in zip(schedule.orders, timed.ends, strict=True):
                assert ends == tuple(expected[action] for action in order)


def test_costs_of_another_number_of_stages_are_refused() -> None:
    with pytest.raises(ScheduleError, match="costs of 3 stages came; wanted 1 or 4"):
        simulate(grouped(2, 2, 4, group_size=2), [UNIT] * 3)


def test_copies_keep_their_queue_and_never_make_compute_wait() -> None:
    for _ in range(30):
        num_ranks, num_chunks = random.randint(1, 6), random.randint(1, 4)
        shape, half = (num_ranks, num_chunks, 4 * num_ranks), math.ceil(num_ranks / 2)
        schedule = uniform(*shape) if random.random() < 0.5 else grouped(*shape, group_size=half)
        timed = simulate(schedule, [UNIT])
        tier = Tier(random.uniform(0.2, 3), random.uniform(0.2, 3), margin=random.choice((0.0, 1.0)))
        for rank in range(num_ranks):
            copies = place(Lines(timed).line(rank), range(rank, schedule.num_stages, num_ranks), tier)
            order, starts, ends = schedule.orders[rank], timed.starts[rank], timed.ends[rank]
            begun = {action: start for action, start in zip(order, starts, strict=True)}
            ended = {action: end for action, end in zip(order, ends, strict=True)}
            for lane in (copies.out, copies.back):
                spans = sorted(lane.values())
                assert all(last <= first + 1e-9 for (_, last), (first, _) in itertools.pairwise(spans))
            for key, (begin, end) in copies.out.items():
                assert begin >= ended[Action("F", *key)] - 1e-9
                assert end - begin == pytest.approx(1 / tier.out_bytes_per_second)
                back_begin, back_end = copies.back[key]
                assert end < back_begin and back_end <= begun[Action("I", *key)] + 1e-9
            assert len(copies.out) + len(copies.kept) == num_chunks * 4 * num_ranks
            assert copies.peak_bytes <= most_in_flight(schedule, rank)


def test_the_candidates_of_a_small_pipeline_worked_by_hand() -> None:
    """Two ranks, three microbatches; F, I and W take a second each, a hop half of one."""
    costs = [StageCost(1.0, 1.0, 1.0, 10, 8, forward_bytes=3, backward_bytes=5, hop_seconds=0.5)] * 2
    timed = simulate(one_f_one_b(2, 3), costs)
    # rank 1: F0 from 1.5, B0 from 2.5 to 4.5; its gradient is on rank 0 at 5, where F0, F1 have ended at 2
    assert timed.starts[0][:3] == (0.0, 1.0, 5.0) and timed.ends[1][:2] == (2.5, 4.5)
    found = list(candidates((2, 1, 3), costs, resident_bytes=(100, 200), tier=Tier(8.0, 8.0, margin=0.0)))
    assert [each.name for each in found] == ["1F1B", "1F1B + 1/1", "GIS", "GIS + 1/1", "PO", "PO + 1/1"]
    plain = found[0]
    # rank 0 holds two when the first one's backward begins; rank 1 has one at a time
    assert plain.peaks_bytes == (100 + 2 * 10 + 5, 200 + 10 + 5)
    assert plain.host_bytes == 0 and plain.peak_bytes == 215
    assert plain.timed.bubble == pytest.approx(1 - 9 / plain.seconds)


def test_a_tier_that_is_fast_enough_takes_half_the_chunks_and_leaves_half_of_what_gis_holds() -> None:
    timed = simulate(grouped(8, 8, 32, group_size=8), [UNIT])
    copies = place(Lines(timed).line(0), range(0, 32, 8), Tier(2.0, 2.0))
    assert not copies.kept and copies.peak_bytes == 32


@pytest.mark.parametrize("num_chunks", [1, 2, 4, 8])
@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_po_with_all_chunks_away_holds_four_at_most_whatever_the_depth(num_ranks: int, num_chunks: int) -> None:
    timed = simulate(uniform(num_ranks, num_chunks, 4 * num_ranks), [UNIT])
    for rank in range(num_ranks):  # k = 0.5: both ways take half as long as a chunk's compute
        copies = place(Lines(timed).line(rank), range(rank, num_ranks * num_chunks, num_ranks), Tier(4 / 3, 4 / 3))
        assert copies.peak_bytes <= 4


def test_the_search_of_a_large_pipeline_weighs_all_groups_with_all_numbers_of_chunks() -> None:
    found = list(candidates((12, 4, 48), [UNIT], tier=Tier(2 / 3, 2 / 3)))
    sizes = {each.timed.schedule.name for each in found}
    assert sizes == {"1F1B-I", "GIS", "GIS-H", "PO", *(f"GIS-{size}" for size in range(7, 12))}
    assert len(found) == 5 * len(sizes)


def test_the_fastest_that_fits_is_chosen_and_the_smallest_budget_named() -> None:
    found = list(candidates((4, 4, 16), [UNIT], tier=Tier(2.0, 2.0)))
    least = min(each.peak_bytes for each in found)
    for budget in range(least, 40):
        chosen = fastest(found, budget)
        assert chosen.peak_bytes <= budget
        assert not any(each.peak_bytes <= budget and each.seconds < chosen.seconds for each in found)
    with pytest.raises(BudgetError) as error:
        fastest(found, least - 1)
    assert error.value.smallest_bytes == least


def test_with_few_microbatches_half_groups_with_half_moved_are_faster_than_po_at_the_same_peak() -> None:
    found = list(candidates((8, 4, 16), [UNIT], tier=Tier(2.0, 2.0)))
    chosen = fastest(found, 10)
    uniform_ones = [each for each in found if each.timed.schedule.name == "PO" and each.peak_bytes <= 10]
    assert uniform_ones and all(chosen.seconds < each.seconds for each in uniform_ones)
