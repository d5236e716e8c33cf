"""What is told of a plan's step storage by storage is what its price was added up from."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import packlight
from packlight.budget import Budget
from packlight.lanes import Lanes, seconds_of
from packlight.memory import Memory
from packlight.planner.cost import Cost, StepCost
from packlight.planner.held import Treatment
from packlight.planner.lives import predicted
from packlight.planner.moving import Moving
from packlight.planner.options import encodings, moves
from packlight.planner.outcome import plain_cost
from packlight.planner.profile import profile
from packlight.planner.released import released
from packlight.planner.revise import rescale
from packlight.planner.solve import solve
from packlight.step import EngineSeconds, Link, OptimizerCost, Profile
from tests.cases import CASES

pytestmark = pytest.mark.usefixtures("seed")

LINK = Link("disk", 1e9, 1e9, 0.0, 2**40, staging_bytes=4096)


def check(memory: Memory, cost: Cost) -> None:
    """Hold a plan's memory against its price, to the byte."""
    told = {name: num_bytes for name, num_bytes in memory.at(memory.peak).items() if num_bytes}
    assert told == {name: num_bytes for name, num_bytes in cost.by_category.items() if num_bytes}
    assert max(map(sum, zip(*memory.by_category().values(), strict=True))) == memory.peak_bytes == cost.peak_bytes
    assert memory.phase_at(memory.peak) == cost.moment


def check_seconds(lanes: Lanes | None, cost: Cost, moving: Moving) -> None:
    """Hold what is told of moves against what they cost: nothing is told where nothing moves."""
    assert (lanes is None) == (moving.stored_bytes == 0)
    if lanes is None:
        return
    assert sum(each.num_bytes for each in lanes.out) == moving.stored_bytes
    done = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
    for name, start, end in lanes.compute():
        done[name] += end - start
    waiting = seconds_of((*lanes.waits_out, *lanes.waits_back))
    assert waiting == pytest.approx(moving.waiting_seconds, rel=1e-9)
    seconds = lanes.num_microbatches * (done["forward"] + done["backward"] + waiting)
    assert seconds + done["optimizer"] + lanes.unplaced_seconds == pytest.approx(cost.seconds, rel=1e-9)


def check_choices(step: Profile, optimizer: OptimizerCost | None, *, window_bytes: int = 0, seed: int = 0) -> None:
    """Draw blocks to recompute and groups to treat, from none to nearly all."""
    draw, costs = random.Random(seed), StepCost(step).through(window_bytes)
    for share in (0.0, 0.3, 0.7, 1.0):
        recomputed = frozenset(block for block in costs.blocks if draw.random() < share / 2)
        free = {group.name for group in costs.treatable(recomputed)}
        options = [*encodings(costs, exact=False), *moves(costs, exact=False)]
        draw.shuffle(options)
        treated: dict[str, Treatment] = {each: how for each, how in options if each in free and draw.random() < share}
        cost = costs.price(recomputed, optimizer, treated=treated)
        memory = predicted(costs, cost, recomputed=recomputed, treated=treated, optimizer=optimizer)
        check(memory, cost)
        check_seconds(memory.lanes, cost, costs.moving(recomputed, treated))


@pytest.mark.parametrize("name", ["gpt", "convnet", "lstm", "mlp"])
def test_the_lives_of_a_plan_add_up_to_its_peak_and_to_its_categories(name: str) -> None:
    case = CASES[name]()
    optimizer = torch.optim.AdamW(case.model.parameters())
    step = profile(case.model, case.batch, optimizer, loss=case.loss, link=LINK)
    for number, cost in enumerate((None, *step.optimizers)):
        check_choices(step, cost, window_bytes=2**16 * number, seed=number)
    for cost in step.optimizers:  # its gradients are freed inside backward
        freed = released(step, cost)
        check_choices(freed, freed.optimizers[0])
    held = replace(step, carried_bytes=2**20, after_backward_bytes=2**22)  # by the loop, of the loss
    check_choices(held, held.optimizers[0])


def test_a_plan_has_them_for_what_it_chooses() -> None:
    case = CASES["mlp"]()
    optimizer = torch.optim.AdamW(case.model.parameters())
    plan = packlight.plan(case.model, case.batch, optimizer, budget="1GiB", loss=case.loss)
    assert plan.predicted is not None and plan.predicted.peak_bytes == plan.estimate.device_peak_bytes
    assert packlight.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.predicted.lanes is None


def test_a_plan_that_moves_tells_when_and_a_slower_step_tells_it_slower() -> None:
    case = CASES["convnet"]()
    fast = replace(LINK, out_bytes_per_second=1e15, in_bytes_per_second=1e15)
    step = replace(profile(case.model, case.batch, None, loss=case.loss, link=fast), engine=EngineSeconds())
    plan = solve(step, Budget.of(plain_cost(StepCost(step)).peak_bytes * 9 // 10), exact=True)
    assert plan.tier == "disk" and plan.predicted is not None and plan.predicted.lanes is not None
    assert packlight.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    slower = replace(plan.predicted, lanes=plan.predicted.lanes.scaled(2.0))
    assert rescale(plan, 2.0, 1.0).predicted == slower


class Two(nn.Module):
    """Two lines that make tensors, each of a size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        out: Tensor = self.second(hidden.exp())
        return out


def test_what_forward_makes_has_its_line_and_what_backward_makes_that_of_its_forward() -> None:
    plan = packlight.plan(Two(), torch.ones(512, 64), None, budget="1GiB", loss=lambda output, _: output.sum())
    assert plan.predicted is not None
    lines = Path(__file__).read_text().splitlines()
    first, second = (
        f"test_lives.py:{number} in forward"
        for number, line in enumerate(lines, 1)
        if line.strip() in ("hidden = self.first(x)", "out: Tensor = self.second(hidden.exp())")
    )
    made = {(each.category, each.site): each.code for each in plan.predicted.held}
    assert made["activations", "the model:0"] == second  # exp's own result, which the model saves
    assert made["temporaries", "first"] == first
    assert made["temporaries", "backward of second"] == made["temporaries", "backward of Two"] == second
    assert made["gradients", "gradient of first.weight"] == first
