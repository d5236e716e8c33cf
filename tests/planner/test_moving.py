"""What a plan with moved groups is predicted to take is what the engine takes, however late the tier is."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch

from packlight.activations import Engine
from packlight.activations.offload import make_tier
from packlight.activations.shelf import Shelf
from packlight.activations.tier import Arrival, OffloadError, Record, Taken, Tier
from packlight.planner import trace
from packlight.planner.cost import StepCost
from packlight.planner.held import Treatment, has_sign, merged
from packlight.planner.loop import Seen
from packlight.planner.moving import moved_bytes, order_of_use, simulate
from packlight.planner.profile import profile
from packlight.planner.tensors import flat_tensors
from packlight.planner.timeline import Timeline
from packlight.step import EngineSeconds, Link, Profile
from tests.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("seed")

DROPPED = Seen(held_outputs=(), carries_outputs=False)
LINK = Link("disk", 1e9, 1e9, 0.0, 2**40)


class LateTier(Shelf[bytes]):
    """Moves nothing before it has to: what is under way fills the window."""

    name = "late"

    def __init__(self, window_bytes: int) -> None:
        super().__init__(
            device=torch.device("cpu"),
            max_in_flight_bytes=window_bytes,
            on_full="raise",
            late="wait",
            keep_bytes=None,
        )
        self._waiting: list[Record[bytes]] = []

    def close(self) -> None:
        self._closed = True

    def _make_room(self, num_bytes: int) -> None:
        room_bytes = max(self.max_in_flight_bytes - num_bytes, 0) if num_bytes else 0
        while self._in_flight_bytes > room_bytes:
            record = self._waiting.pop(0)
            if record.source is not None:
                record.place = record.source.view(torch.uint8).numpy().tobytes()
            self._moved(record)

    def _let_go(self, record: Record[bytes]) -> None:
        self._make_room(0)

    def _reap(self) -> None:
        """Nothing ends by itself."""

    def _reserve(self, num_bytes: int) -> bytes:
        return bytes(1)

    def _release(self, place: bytes) -> None:
        """Python does."""

    def _send(self, record: Record[bytes], place: bytes) -> None:
        self._waiting.append(record)

    def _bring(self, record: Record[bytes], place: bytes) -> Arrival:
        made = torch.empty(record.numel, dtype=record.dtype)
        made.view(torch.uint8).numpy()[:] = memoryview(place)
        return Taken(lambda: made)

    def _stored_bytes(self) -> int:
        return 0

    def _pinned_bytes(self) -> int:
        return 0

    def _full(self, wanted_bytes: int) -> OffloadError:
        return OffloadError("full")


@cache
def profiled(name: str) -> Profile:
    """The step of a case: shapes and names, which are those of every model of that name."""
    case = CASES[name]()
    with mock.patch.object(trace, "MIN_BYTES", 0):  # the models are small
        step = profile(case.model, case.batch, None, loss=case.loss, seen=DROPPED)
    return replace(step, link=LINK)


def take_step(case: Case, line: Timeline) -> None:
    case.model.zero_grad()
    with line:
        line.explicit_phase = "forward"
        output = case.output()
        line.explicit_phase = None
        loss = case.loss(output, case.batch)
        del output
        loss.backward()


def real_peaks(case: Case, choices: Mapping[str, str], tier: Tier, uses: Sequence[str]) -> list[int]:
    peaks = []
    with Engine(case.model, choices, tier=tier, min_bytes=0, drains=True, uses=uses):
        for _ in range(2):
            line = Timeline("cpu")
            for tensor in (*case.model.parameters(), *case.model.buffers(), *flat_tensors(case.batch)):
                line.add(tensor)
            take_step(case, line)
            line.close()
            peaks.append(line.peak()[0])
    return peaks


def choices_of(step: Profile, costs: StepCost, treated: Mapping[str, Treatment]) -> dict[str, str]:
    return {
        step.saves[at].site: each.choice if each.choice == "offload" else f"{each.choice}:{each.codec}"
        for name, each in treated.items()
        for at in costs.groups[name].saves
    }


@pytest.mark.parametrize("num_groups", [0, 1, 3])
@pytest.mark.parametrize("name", CASES)
def test_moved_groups_take_the_predicted_bytes(name: str, num_groups: int) -> None:
    step, case = profiled(name), CASES[name]()
    largest_bytes = max(StepCost(step).group_bytes(group) for group in StepCost(step).groups)
    costs = StepCost(step).through(max(1, num_groups * largest_bytes))
    treated = {name: Treatment("offload") for name in costs.groups if random.random() < 0.7}
    predicted = costs.price((), None, treated=treated)
    uses = order_of_use(step, costs.groups, treated)
    found = real_peaks(case, choices_of(step, costs, treated), LateTier(costs.window_bytes), uses)
    assert [predicted.peak_bytes] * 2 == found
    assert sum(predicted.by_category.values()) == predicted.peak_bytes


@pytest.mark.parametrize("num_groups", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_codes_that_move_take_no_more_than_predicted(name: str, num_groups: int) -> None:
    """Codes and scales are put one after the other, so the first may be let go of when the second is put.

    And where one function saves several tensors, those that are put first make room before the others are encoded.
    """
    step, case = profiled(name), CASES[name]()
    largest_bytes = max(StepCost(step).group_bytes(group) for group in StepCost(step).groups)
    costs = StepCost(step).through(max(1, num_groups * largest_bytes))
    able = [group for group in costs.groups.values() if group.can_encode and not has_sign(step, group)]
    ways = [Treatment("compress+offload", "int8")] * 2 + [Treatment("compress", "int8"), Treatment("offload")]
    treated = {group.name: random.choice(ways) for group in able if random.random() < 0.7}
    predicted = costs.price((), None, treated=treated)
    uses = order_of_use(step, costs.groups, treated)
    found = real_peaks(case, choices_of(step, costs, treated), LateTier(costs.window_bytes), uses)
    slack_bytes = max((moved_bytes(step, costs.groups[name], each) for name, each in treated.items()), default=0)
    assert all(0 <= predicted.peak_bytes - each <= slack_bytes for each in found)


def test_codes_and_scales_leave_a_window_one_after_the_other() -> None:
    """The codes of one group make room for those of another, and the first one's scales stay: 128 bytes."""
    step, case = profiled("flat"), CASES["flat"]()
    (largest_bytes,) = {StepCost(step).group_bytes(f"{place}:0") for place in (6, 9, 12, 15, 18, 21)}
    costs = StepCost(step).through(2 * largest_bytes)
    treated = {f"{place}:0": Treatment("compress+offload", "int8") for place in (6, 9, 12, 21)}
    treated |= {"15:0": Treatment("compress", "int8"), "18:0": Treatment("offload")}
    uses = order_of_use(step, costs.groups, treated)
    found = real_peaks(case, choices_of(step, costs, treated), LateTier(costs.window_bytes), uses)
    assert [costs.price((), None, treated=treated).peak_bytes] * 2 == found


@pytest.mark.parametrize("name", CASES)
def test_the_disk_takes_the_predicted_bytes(name: str, tmp_path: Path) -> None:
    step, case = profiled(name), CASES[name]()
    largest_bytes = max(StepCost(step).group_bytes(group) for group in StepCost(step).groups)
    costs = StepCost(step).through(2 * largest_bytes)
    treated = {name: Treatment("offload") for name in costs.groups if random.random() < 0.7}
    predicted = costs.price((), None, treated=treated)
    tier = make_tier(
        "disk", device=torch.device("cpu"), folder=tmp_path, max_in_flight_bytes=costs.window_bytes, late="steady"
    )
    uses = order_of_use(step, costs.groups, treated)
    assert [predicted.peak_bytes] * 2 == real_peaks(case, choices_of(step, costs, treated), tier, uses)


class CountingTier(LateTier):
    """Counts copies, out and back."""

    num_copies = 0

    def _send(self, record: Record[bytes], place: bytes) -> None:
        self.num_copies += 1
        super()._send(record, place)

    def _bring(self, record: Record[bytes], place: bytes) -> Arrival:
        self.num_copies += 1
        return super()._bring(record, place)


@pytest.mark.parametrize("choice", ["offload", "compress+offload"])
@pytest.mark.parametrize("name", CASES)
def test_each_copy_that_the_engine_makes_takes_its_time_from_compute(name: str, choice: str) -> None:
    step, case = profiled(name), CASES[name]()
    step = replace(step, link=replace(LINK, busy_seconds_per_copy=1.0), engine=EngineSeconds())
    costs = StepCost(step).through(2**40)
    able = list(costs.groups.values())
    if choice != "offload":
        able = [group for group in able if group.can_encode and not has_sign(step, group)]
    treated = {group.name: Treatment(choice, "int8" if "compress" in choice else "") for group in able}
    tier = CountingTier(costs.window_bytes)
    real_peaks(case, choices_of(step, costs, treated), tier, order_of_use(step, costs.groups, treated))
    assert 2 * sum(costs.treatment_seconds(*each) for each in treated.items()) == tier.num_copies
    assert tier.num_copies > 0 or not able


@pytest.mark.parametrize("slowness", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", ["gpt", "convnet", "lstm", "mlp"])
def test_copies_follow_one_another_and_compute_waits_for_them_as_long_as_is_predicted(
    name: str, slowness: float
) -> None:
    """Copies take this many times what compute takes, in a window of two of the largest groups."""
    step = profiled(name)
    costs = StepCost(step).through(2 * max(map(StepCost(step).group_bytes, StepCost(step).groups)))
    ways = [Treatment("offload"), Treatment("compress+offload", "int8")]
    treated = {
        group.name: random.choice(ways if group.can_encode and not has_sign(step, group) else ways[:1])
        for group in random.sample(list(costs.groups.values()), random.randint(1, len(costs.groups)))
    }
    speed = sum(map(costs.group_bytes, treated)) / (slowness * step.seconds)
    step = replace(step, link=replace(LINK, out_bytes_per_second=speed, in_bytes_per_second=2 * speed))
    made = simulate(step, costs.groups, treated, gone=(), window_bytes=costs.window_bytes)
    for lane, rate in ((made.out, speed), (made.back, 2 * speed)):
        assert all(one.end <= following.start for one, following in pairwise(lane))
        assert [each.end - each.start for each in lane] == pytest.approx([each.num_bytes / rate for each in lane])
    saves = {name: [step.saves[at] for at in costs.groups[name].saves] for name in treated}
    in_order = sorted(treated, key=lambda name: saves[name][0].packed)
    assert list(dict.fromkeys(each.group for each in made.out)) == in_order
    assert sum(each.num_bytes for each in made.out) == made.stored_bytes
    uses = {name: len(merged((each.unpacked, each.used) for each in saves[name])) for name in treated}
    assert Counter(each.group for each in made.back) == uses
    sizes = {name: moved_bytes(step, costs.groups[name], each) for name, each in treated.items()}
    assert all(each.num_bytes == sizes[each.group] for each in made.back)
    for waits, seconds in ((made.waits_out, made.waiting_out_seconds), (made.waits_back, made.waiting_back_seconds)):
        assert all(one.end <= following.start for one, following in pairwise(waits))
        assert sum(each.end - each.start for each in waits) == pytest.approx(seconds, rel=1e-9)
    assert made.waits_back and (slowness < 1 or made.waits_out)
    forward_end = step.forward_seconds + made.waiting_out_seconds
    assert made.out[-1].end <= forward_end * (1 + 1e-12) and forward_end <= made.back[0].start * (1 + 1e-12)
    assert made.back[-1].end <= (step.seconds + made.waiting_seconds) * (1 + 1e-12)
