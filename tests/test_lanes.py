"""Lanes are small however much moves, and add up to the bytes and seconds of what they are made of."""

import json
import random
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from packlight.lanes import MOST_STRETCHES, Lanes, Stretch, joined, seconds_of

MOST_JSON_BYTES = 200_000


def lane(number: int, *, seed: int = 0) -> list[Stretch]:
    draw, now, found = random.Random(seed), 0.0, []
    for at in range(number):
        start = now + draw.choice([0.0, draw.random()])
        now = start + draw.random()
        found.append(Stretch(f"model.layers.{at}.mlp.down_proj:0", draw.randrange(2**30), start, now))
    return found


def lanes(number: int) -> Lanes:
    out, back, waits_out, waits_back = (joined(lane(number, seed=seed)) for seed in range(4))
    forward_end = max(out[-1].end, waits_out[-1].end) + 1
    late = [replace(each, start=each.start + forward_end, end=each.end + forward_end) for each in waits_back]
    end = late[-1].end + 1
    return Lanes(out, back, waits_out, tuple(late), forward_end, end, update_seconds=2.0, unplaced_seconds=0.5)


@pytest.mark.parametrize("number", [0, 1, MOST_STRETCHES, MOST_STRETCHES + 1, 5000])
def test_a_lane_whose_neighbours_are_joined_has_its_bytes_its_seconds_and_its_order(number: int) -> None:
    whole = lane(number)
    made = joined(whole)
    assert len(made) <= MOST_STRETCHES and (number > MOST_STRETCHES or list(made) == whole)
    assert sum(each.num_joined for each in made) == number
    assert sum(each.num_bytes for each in made) == sum(each.num_bytes for each in whole)
    assert seconds_of(made) == pytest.approx(seconds_of(whole), rel=1e-9)
    assert all(one.end <= following.start for one, following in pairwise(made))
    ends = {each.end for each in whole}
    assert all(each.end in ends for each in made)


def test_lanes_are_small_however_much_moves() -> None:
    assert len(json.dumps(asdict(lanes(40_000)), indent=1)) < MOST_JSON_BYTES


def test_compute_is_what_lies_between_its_waits() -> None:
    made = lanes(20)
    pieces = [*made.compute()]
    waits = [("wait", each.start, each.end) for each in (*made.waits_out, *made.waits_back)]
    every = sorted([*pieces, *waits], key=lambda each: each[1])
    assert [0.0, *(end for _, _, end in every)] == [*(start for _, start, _ in every), made.end]
    assert [name for name, *_ in pieces] == sorted((name for name, *_ in pieces), key="forward backward optimizer".find)
    assert pieces[-1] == ("optimizer", made.backward_end, made.end)


def test_a_step_that_is_slower_is_slower_everywhere() -> None:
    made = lanes(20)
    slow = made.scaled(4.0)
    assert slow.end == 4 * made.end and slow.unplaced_seconds == 2.0
    assert [(name, start / 4, end / 4) for name, start, end in slow.compute()] == [*made.compute()]
    assert slow.scaled(0.25) == made
