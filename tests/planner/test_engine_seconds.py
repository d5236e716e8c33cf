"""The engine's own work is counted for every tensor that it sees, and only where it looks on."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packlight
from packlight.activations.blocks import find_blocks
from packlight.activations.engine import Engine
from packlight.planner.carry import carry_out
from packlight.planner.cost import StepCost
from packlight.planner.fake import FakeLine
from packlight.planner.hardware import NUM_CHILLED, Chill, _engine_of, measure
from packlight.planner.held import Treatment
from packlight.planner.known_hardware import KNOWN
from packlight.planner.loop import Seen
from packlight.planner.profile import profile
from packlight.planner.solve import solve
from packlight.step import EngineSeconds, Profile
from tests.cases import CASES, Case

pytestmark = pytest.mark.usefixtures("seed")

ENGINE = EngineSeconds(codec_seconds={"int8": 1e-3}, call_seconds=7.0, save_seconds=100.0, again_seconds=10_000.0)


def profiled(case: Case, **seen: Any) -> Profile:
    step = profile(case.model, case.batch, None, loss=case.loss, seen=Seen(**seen))
    return replace(step, engine=ENGINE)


def saves_in_forward(case: Case) -> Counter[str]:
    """Count what a real forward saves: in all, and inside each block."""
    numbers, inside, hooks = Counter[str](), [""], []

    def pack(tensor: Tensor) -> Tensor:
        numbers.update({"", *inside})
        return tensor.detach()  # an output that is saved by itself would never die

    for block in find_blocks(case.model):
        if block.start is None:
            module = case.model.get_submodule(block.path)
            hooks.append(module.register_forward_pre_hook(lambda *_, path=block.path: inside.append(path)))
            hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.output()
    for hook in hooks:
        hook.remove()
    return numbers


@pytest.mark.parametrize("name", CASES)
def test_a_profile_counts_as_many_saves_as_a_real_forward_makes(name: str) -> None:
    case = CASES[name]()
    step, numbers = profiled(case), saves_in_forward(case)
    assert step.num_saves == numbers[""] > 0
    once = [path for path, number in Counter(at.block for at in step.regions).items() if number == 1]
    found = {region.block: region.num_saves for region in step.regions if region.block in once}
    assert {path: number for path, number in found.items() if path in numbers} == {
        path: numbers[path] for path in found if path in numbers
    }


class Twice(nn.Module):
    """Runs a part again in backward, which saves once more there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh())

    def forward(self, values: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.last, self.first(values), use_reentrant=True).sum()  # type: ignore[no-any-return]


def test_what_backward_saves_by_itself_is_not_counted() -> None:
    model, values = Twice(), torch.randn(4, 16)
    plain = replace(profile(model, values, None, loss=lambda output, _: output), engine=ENGINE)
    assert 0 < plain.num_saves < 6


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("name", ["gpt", "convnet"])
def test_hooks_take_time_for_all_saves_as_soon_as_one_is_treated(name: str, num_microbatches: int) -> None:
    step = profiled(CASES[name](), num_microbatches=num_microbatches)
    costs = StepCost(step)
    plain = costs.price((), None).seconds
    assert plain == pytest.approx(step.seconds * num_microbatches)

    block = costs.blocks[0]
    again = [region for region in step.regions if region.block == block]
    second_run = sum(region.forward_seconds + region.num_saves * ENGINE.again_seconds for region in again)
    assert sum(region.num_saves for region in again) > 0
    assert costs.price({block}, None).seconds == pytest.approx(plain + second_run * num_microbatches)

    hooks = step.num_saves * ENGINE.save_seconds * num_microbatches
    group = next(group for group in costs.groups.values() if group.can_encode)
    treated = {group.name: Treatment("compress", "int8")}
    treatment = costs.treatment_seconds(group.name, treated[group.name])
    assert treatment >= ENGINE.call_seconds * num_microbatches
    assert costs.price((), None, treated=treated).seconds == pytest.approx(plain + hooks + treatment)


def test_hooks_are_counted_where_an_engine_is_made_and_not_where_blocks_are_only_recomputed() -> None:
    case = CASES["gpt"]()
    step = profiled(case)
    costs = StepCost(step)
    budgets = [packlight.Budget(costs.price((), None).peak_bytes * share // 100) for share in (95, 75)]
    seen = set()
    for save_seconds in (0.0, 1e9):
        for budget in budgets:
            plan = solve(replace(step, engine=EngineSeconds(save_seconds=save_seconds)), budget)  # codecs take nothing
            carried = carry_out(plan, case.model)
            has_engine = isinstance(carried._handle, Engine)
            carried.remove()
            assert has_engine == any(choice.choice not in ("keep", "recompute") for choice in plan.choices)
            assert has_engine == (plan.estimate.step_seconds >= 1e9) or save_seconds == 0
            seen.add(has_engine)
            assert save_seconds == 0 or not has_engine, "recomputing fits, and no hooks are needed for it"
    assert seen == {False, True}


def test_operators_in_a_queue_give_the_host_time_for_the_hooks_and_an_optimiser_changes_nothing() -> None:
    rates = KNOWN["h100-80g"].rates()
    lasting = []
    for side in (8, 4096):
        line = FakeLine("cpu", rates, allocator="cuda")
        with line:
            torch.empty(side, side) @ torch.empty(side, side)
        found = line.engine_seconds(2)
        spare_seconds = line.seconds - 3 * rates.launch_seconds
        expected = max(0.0, rates.engine.save_seconds - spare_seconds / 2)
        assert found.save_seconds == pytest.approx(expected, rel=1e-6)
        assert found.codec_seconds == rates.engine.codec_seconds
        assert found.call_seconds == rates.engine.call_seconds
        lasting.append(found.save_seconds)
        line.close()
    assert lasting[0] == pytest.approx(rates.engine.save_seconds) and lasting[1] == 0

    case = CASES["gpt"]()
    optimizers = [None, torch.optim.AdamW(case.model.parameters())]
    steps = [profile(case.model, case.batch, each, loss=case.loss, hardware="h100-80g") for each in optimizers]
    assert steps[0].engine == steps[1].engine


def test_a_cpu_does_its_operators_and_the_hooks_one_after_the_other() -> None:
    line = FakeLine("cpu", measure("cpu"))
    with line:
        torch.ones(512, 512) @ torch.ones(512, 512)
    assert line.engine_seconds(1) == measure("cpu").engine
    line.close()


def test_what_the_engine_takes_is_told_apart_from_what_operators_and_codecs_take() -> None:
    best = {"forward": 1.0, "plain": 3.0, "kept": 3.5, "encoded": 5.5, "again": 4.2}
    found = _engine_of(best, 10, 0.05, {"int8": 1e-9})
    assert found.save_seconds == pytest.approx(0.05)
    assert found.call_seconds == pytest.approx(0.15)
    assert found.again_seconds == pytest.approx(0.02)
    assert found.codec_seconds == {"int8": 1e-9}
    nothing = _engine_of(dict.fromkeys(best, 1.0), 10, 0.05, {})
    assert nothing.save_seconds == nothing.call_seconds == nothing.again_seconds == 0


def test_caches_are_chilled_by_real_memory_wherever_tensors_are_made_by_default() -> None:
    with torch.device("meta"):
        chill = Chill(torch.device("cpu"))
    parts = [next(chill._parts) for _ in range(NUM_CHILLED + 1)]
    assert {part.device.type for part in parts} == {"cpu"} and parts[0].data_ptr() == parts[-1].data_ptr()
    chill()
    assert parts[1].eq(1).all() and parts[2].eq(0).all()


def test_a_gpu_s_operators_leave_the_host_s_caches_alone() -> None:
    chill = Chill(torch.device("cuda"))
    chill()
    assert list(chill._parts) == []
