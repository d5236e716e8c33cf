"""The engine's own work is counted for every tensor that it sees, and only where it looks on."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from packlight.planner.cost import StepCost
from packlight.planner.fake import FakeLine
from packlight.planner.hardware import measure
from packlight.planner.held import Treatment
from packlight.planner.known_hardware import KNOWN
from packlight.planner.loop import Seen
from packlight.planner.profile import profile
from packlight.step import EngineSeconds, Profile
from tests.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("seed")

ENGINE = EngineSeconds(codecs={"int8": 1e-3}, call=7.0, save=100.0, again=10_000.0)


def profiled(case: Case, **seen: Any) -> Profile:
    step = profile(case.model, case.batch, None, loss=case.loss, seen=Seen(**seen))
    return replace(step, engine=ENGINE)


def num_saves_in_forward(case: Case) -> int:
    numbers: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        numbers.append(tensor.numel())
        return tensor.detach()  # an output that is saved by itself would never die

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.output()
    return len(numbers)


@pytest.mark.parametrize("name", CASES)
def test_a_profile_counts_as_many_saves_as_a_real_forward_makes(name: str) -> None:
    case = CASES[name]()
    step = profiled(case)
    assert step.num_saves == num_saves_in_forward(case) > 0
    outermost = [at for at in step.regions if not any(_is_around(other, at) for other in step.regions)]
    assert sum(region.num_saves for region in outermost) <= step.num_saves


def _is_around(other: Any, region: Any) -> bool:
    return other is not region and other.start <= region.start and region.end <= other.end


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("name", ["gpt", "convnet"])
def test_hooks_take_time_for_all_saves_as_soon_as_anything_is_chosen(name: str, num_microbatches: int) -> None:
    step = profiled(CASES[name](), num_microbatches=num_microbatches)
    costs = StepCost(step)
    plain = costs.price((), None).seconds
    assert plain == pytest.approx(step.seconds * num_microbatches)
    hooks = step.num_saves * ENGINE.save * num_microbatches

    block = costs.blocks[0]
    again = [region for region in step.regions if region.block == block]
    second_run = sum(region.forward_seconds + region.num_saves * ENGINE.again for region in again)
    assert sum(region.num_saves for region in again) > 0
    recomputed = costs.price({block}, None).seconds
    assert recomputed == pytest.approx(plain + hooks + second_run * num_microbatches)

    group = next(group for group in costs.groups.values() if group.can_encode)
    treated = {group.name: Treatment("compress", "int8")}
    treatment = costs.treatment_seconds(group.name, treated[group.name])
    assert treatment >= ENGINE.call * num_microbatches
    assert costs.price((), None, treated=treated).seconds == pytest.approx(plain + hooks + treatment)


def test_a_device_that_is_behind_its_queue_sees_less_of_the_hooks_and_one_that_waits_all_of_it() -> None:
    rates = KNOWN["h100-80g"].rates()
    shares = []
    for side in (8, 2048):
        line = FakeLine("cpu", rates, allocator="cuda")
        with line:
            values = torch.ones(side, side)
            for _ in range(3):
                values = values @ values / side
        shares.append(line.engine_seconds().save / rates.engine.save)
        assert line.engine_seconds().again / rates.engine.again == pytest.approx(shares[-1])
        assert line.engine_seconds().codecs == rates.engine.codecs
        assert line.engine_seconds().call == rates.engine.call
        line.close()
    assert shares[0] == pytest.approx(1.0) and 0 < shares[1] < 0.5


def test_a_cpu_does_its_operators_and_the_hooks_one_after_the_other() -> None:
    line = FakeLine("cpu", measure("cpu"))
    with line:
        torch.ones(512, 512) @ torch.ones(512, 512)
    assert line.engine_seconds() == measure("cpu").engine
    line.close()


def test_what_the_engine_takes_is_measured_and_none_of_it_is_nothing_on_a_cpu() -> None:
    engine = measure("cpu").engine
    assert engine.save > 0 and engine.call > 0 and engine.again >= 0
    assert all(seconds > 0 for seconds in engine.codecs.values())
