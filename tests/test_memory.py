"""A condensed line is small, and says the same as the whole line at every event that it keeps; the peak is one."""

import json
import random
from dataclasses import asdict

import pytest

from packlight.memory import MOST_EVENTS, MOST_STORAGES, SMALL_SHARE, Held, Phase, condensed

CATEGORIES = ("parameters", "activations", "temporaries")
MOST_JSON_BYTES = 250_000


def line(num_events: int, num_storages: int, *, seed: int) -> list[Held]:
    draw = random.Random(seed)
    found = []
    for at in range(num_storages):
        born = draw.randrange(num_events)
        died = min(num_events, born + 1 + int(draw.expovariate(1 / 40)) + draw.choice([0, 0, num_events // 2]))
        num_bytes = draw.choice([draw.randrange(100), draw.randrange(2**16), draw.randrange(2**22)])
        code = f"model.py:{draw.randrange(300)} in forward"
        found.append(Held(num_bytes, born, died, draw.choice(CATEGORIES), f"layers.{at}.mlp.down:0", code))
    return found


def divided(lives: list[Held], event: int) -> dict[str, int]:
    found = dict.fromkeys(CATEGORIES, 0)
    for each in lives:
        if each.born <= event < each.died:
            found[each.category] += each.num_bytes
    return found


@pytest.mark.parametrize(("num_events", "num_storages"), [(1, 1), (40, 30), (700, 500), (3000, 1500)])
def test_a_condensed_line_is_the_whole_line_at_every_event_that_it_keeps(num_events: int, num_storages: int) -> None:
    lives = line(num_events, num_storages, seed=num_events)
    middle = num_events // 2
    phases = [Phase("forward", 0, middle), Phase("backward", middle, num_events)]
    made = condensed(lives, num_events=num_events, phases=phases)
    whole = [sum(divided(lives, event).values()) for event in range(num_events)]
    lines = made.by_category()
    for at, event in list(enumerate(made.events))[:: max(1, len(made.events) // 200)]:
        assert dict.fromkeys(CATEGORIES, 0) | made.at(at) == divided(lives, event)
        assert {name: values[at] for name, values in lines.items() if values[at]} == {
            name: num_bytes for name, num_bytes in made.at(at).items() if num_bytes
        }
    assert made.peak_bytes == max(whole) == whole[made.events[made.peak]]
    assert made.phase_at(0) == ("forward" if middle else "backward") and made.phase_at(len(made.events) - 1)


def test_a_condensed_line_is_small_however_long_the_line() -> None:
    lives = line(40_000, 30_000, seed=1)
    made = condensed(lives, num_events=40_000, phases=[Phase("forward", 0, 40_000)])
    assert len(made.held) == MOST_STORAGES and len(made.events) <= MOST_EVENTS + 4
    assert len(json.dumps(asdict(made), indent=1)) < MOST_JSON_BYTES


def test_the_storages_at_the_peak_are_told_one_by_one_unless_they_are_small() -> None:
    lives = line(9000, 6000, seed=2)
    made = condensed(lives, num_events=9000, phases=[])
    event = made.events[made.peak]
    large = [at for at in lives if at.born <= event < at.died and at.num_bytes >= made.peak_bytes * SMALL_SHARE]
    told = [(each.num_bytes, each.site, each.code) for each in made.alive(made.peak)]
    expected = sorted(((each.num_bytes, each.site, each.code) for each in large), reverse=True)
    assert sorted(told, reverse=True) == expected[:MOST_STORAGES]


def test_of_equal_peaks_the_given_one_is_kept() -> None:
    made = condensed([Held(8, 1, 2, "other"), Held(8, 3, 4, "other")], num_events=5, phases=[], peak=3)
    assert (made.peak, made.peak_bytes) == (3, 8)
