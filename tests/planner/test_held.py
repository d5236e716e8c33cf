"""What a plan with encoded groups is predicted to take is what the engine takes, to the byte."""

from collections.abc import Mapping
from unittest import mock

import pytest

from packlight.activations import Engine
from packlight.planner import trace
from packlight.planner.cost import StepCost
from packlight.planner.held import Treatment
from packlight.planner.loop import Seen
from packlight.planner.profile import profile
from packlight.planner.tensors import flat_tensors
from packlight.planner.timeline import Timeline
from packlight.step import Profile
from tests.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("seed")

DROPPED = Seen(held_outputs=(), carries_outputs=False)


def profiled(case: Case) -> Profile:
    with mock.patch.object(trace, "MIN_BYTES", 0):  # the models are small
        return profile(case.model, case.batch, None, loss=case.loss, seen=DROPPED)


def real_peak(case: Case, choices: Mapping[str, str], *, codec: str) -> int:
    with Engine(case.model, choices, codec=codec, min_bytes=0):
        take_step(case, Timeline("cpu"))
        line = Timeline("cpu")
        for parameter in case.model.parameters():
            line.add(parameter)
        for tensor in (*case.model.buffers(), *flat_tensors(case.batch)):
            line.add(tensor)
        take_step(case, line)
        line.close()
    return line.peak()[0]


def take_step(case: Case, line: Timeline) -> None:
    case.model.zero_grad()
    with line:
        line.explicit_phase = "forward"
        output = case.output()
        line.explicit_phase = None
        loss = case.loss(output, case.batch)
        del output
        loss.backward()


def sites(step: Profile, costs: StepCost, names: Mapping[str, Treatment]) -> dict[str, str]:
    return {step.saves[at].site: "compress" for name in names for at in costs.groups[name].saves}


@pytest.mark.parametrize("codec", ["fp8", "int4"])
@pytest.mark.parametrize("name", CASES)
def test_encoded_groups_take_the_predicted_bytes(name: str, codec: str) -> None:
    case = CASES[name]()
    step = profiled(case)
    costs = StepCost(step)
    treated = {group.name: Treatment("compress", codec) for group in costs.groups.values() if group.can_encode}
    assert treated
    predicted = costs.price((), None, treated=treated)
    assert predicted.peak_bytes == real_peak(case, sites(step, costs, treated), codec=codec)
    assert sum(predicted.by_category.values()) == predicted.peak_bytes


@pytest.mark.parametrize("kept", range(3))
@pytest.mark.parametrize("name", CASES)
def test_encoded_groups_beside_recomputed_blocks_take_the_predicted_bytes(name: str, kept: int) -> None:
    case = CASES[name]()
    step = profiled(case)
    costs = StepCost(step)
    blocks = [block for at, block in enumerate(costs.blocks) if at % 3 != kept and costs.held_bytes(block) > 0]
    treated = {group.name: Treatment("compress", "fp8") for group in costs.treatable(blocks) if group.can_encode}
    predicted = costs.price(blocks, None, treated=treated)
    choices = sites(step, costs, treated) | dict.fromkeys(blocks, "recompute")
    assert predicted.peak_bytes == real_peak(case, choices, codec="fp8")


@pytest.mark.parametrize("name", CASES)
def test_a_site_has_the_same_name_when_it_is_traced_and_when_it_runs(name: str) -> None:
    case = CASES[name]()
    step = profiled(case)
    traced = {save.site for save in step.saves if save.site}
    with Engine(case.model, {"*": "keep"}) as engine:
        case.value()
        seen = set(engine.sites())
    assert traced
    assert traced <= seen
