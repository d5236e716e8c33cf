"""Plans for named hardware with optimiser states in host memory: counted, bounded by the host's budget, and named."""

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from packlight import Budget, BudgetError, Plan, plan
from packlight.budget import parse_bytes
from packlight.cli import main
from packlight.optim import adopt
from packlight.optim.adopted_state import CompactState
from packlight.optim.hosted import ON_HOST, staging_bytes
from packlight.optim.state import state_bytes
from packlight.planner import carry
from packlight.planner.carry import adopt_formats
from packlight.planner.cost import StepCost
from packlight.planner.hardware import HOST_FORMATS
from packlight.planner.known_hardware import KNOWN
from packlight.planner.links import find_link
from packlight.planner.measure import StepWatch
from packlight.planner.moving import moved_bytes
from packlight.planner.outcome import treated_by
from packlight.planner.profile import profile
from packlight.planner.program import lossiness
from packlight.planner.released import released
from packlight.planner.revise import joined
from packlight.planner.solve import Solver, allowed_formats, solve
from packlight.step import OptimizerCost, Profile

HARDWARE = "a100-40g"
AMPLE = "16GiB"

pytestmark = pytest.mark.usefixtures("seed")


def net(width: int = 1024, num_layers: int = 6) -> nn.Sequential:
    """Few activations beside its states."""
    with torch.device("meta"):
        layers = [
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(num_layers)
        ]
    return nn.Sequential(*layers)


def summed(output: Tensor, _: object) -> Tensor:
    return output.sum()


def step_of(host_budget: str | None, model: nn.Module) -> Profile:
    optimizer, batch = torch.optim.AdamW(model.parameters()), torch.empty(64, 1024, device="meta")
    link = find_link(torch.device("meta"), host_budget=host_budget, known=KNOWN[HARDWARE])
    return profile(model, batch, optimizer, loss=summed, hardware=HARDWARE, link=link)


@cache
def usual_step(host_budget: str | None) -> Profile:
    return step_of(host_budget, net())


@cache
def plan_for(budget: int | str, host_budget: int | str | None, *, exact: bool = False, release: bool = False) -> Plan:
    model = net()
    return plan(
        model,
        torch.empty(64, 1024, device="meta"),
        torch.optim.AdamW(model.parameters()),
        budget=budget,
        loss=summed,
        host_budget=host_budget,
        hardware=HARDWARE,
        exact=exact,
        release_gradients=release,
    )


def large(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.dim() > 1}


def formats(made: Plan) -> set[str]:
    return set(made.state_formats.values())


def hosted(step: Profile) -> dict[str, OptimizerCost]:
    return {cost.state_format: cost for cost in step.optimizers if cost.host_bytes}


def test_bytes_on_the_host_are_the_formula_and_the_device_holds_the_small_parameters_states() -> None:
    model = net()
    costs, params = hosted(step_of(AMPLE, model)), large(model)
    assert set(costs) == {name + ON_HOST for name in HOST_FORMATS}
    small_bytes = sum(4 + 2 * param.nbytes for name, param in model.named_parameters() if name not in params)
    for name, cost in costs.items():
        own = name.removesuffix(ON_HOST)
        states = sum(state_bytes(param.shape, param.dtype, own) for param in params.values())
        assert cost.host_bytes == states + staging_bytes(params.values())
        assert cost.state_bytes == small_bytes
        assert {at for at in params if cost.formats[at] == name} == set(params)
        assert cost.in_bytes == sum(param.nbytes for param in params.values())
        assert cost.out_bytes == 2 * cost.in_bytes


def test_a_step_takes_the_longer_of_copies_and_kernels_and_both_where_each_parameter_goes_alone() -> None:
    model = net()
    step, known = step_of(AMPLE, model), KNOWN[HARDWARE]
    num_elements = sum(param.numel() for param in large(model).values())
    copy_seconds = 12 * num_elements / known.host_bytes_per_second
    for name, cost in hosted(step).items():
        assert step.copy_seconds(cost) == pytest.approx(copy_seconds)
        kernel_seconds = num_elements * known.rates().host_update_seconds[name.removesuffix(ON_HOST)]
        assert cost.host_seconds == pytest.approx(kernel_seconds)
        beside = max(copy_seconds, kernel_seconds) + copy_seconds / 12  # the first one's way out, the last one's back
        assert step.update_seconds(cost) == pytest.approx(cost.seconds + beside)
        (alone,) = (early := released(step, cost)).optimizers
        assert early.update_seconds(alone) >= cost.seconds + copy_seconds + kernel_seconds


@pytest.mark.parametrize("host_budget", [None, "1MiB"])
def test_without_room_on_the_host_states_stay(host_budget: str | None) -> None:
    step = usual_step(host_budget)
    assert not [cost for cost in allowed_formats(step, exact=False) if cost.host_bytes]
    assert allowed_formats(usual_step(AMPLE), exact=True) == [usual_step(AMPLE).optimizers[0]]


def test_room_on_the_host_makes_smaller_budgets_possible_and_the_plan_says_what_lies_there() -> None:
    smallest = plan_for("16GiB", None).smallest_budget_bytes
    with_host = plan_for("16GiB", AMPLE)
    assert with_host.smallest_budget_bytes < smallest
    assert formats(with_host) == {"fp32"}, "where everything fits nothing is changed"
    made = plan_for(with_host.smallest_budget_bytes, AMPLE)
    (chosen,) = {name for name in formats(made) if name.endswith(ON_HOST)}
    cost = hosted(usual_step(AMPLE))[chosen]
    assert made.estimate.host_peak_bytes >= cost.host_bytes
    assert made.estimate.device_peak_bytes <= with_host.smallest_budget_bytes
    assert chosen in str(made)
    with pytest.raises(BudgetError):
        plan_for(with_host.smallest_budget_bytes, AMPLE, exact=True)
    assert Plan.from_dict(made.to_dict()) == made


def test_the_budget_of_the_host_bounds_which_format_lies_there() -> None:
    tight = plan_for("16GiB", AMPLE).smallest_budget_bytes
    costs = hosted(usual_step(AMPLE))
    for name in ("8bit" + ON_HOST, "4bit" + ON_HOST):
        made = plan_for(int(1.05 * tight), costs[name].host_bytes)
        assert made.estimate.host_peak_bytes <= costs[name].host_bytes
        assert "fp32" + ON_HOST not in formats(made)
    with pytest.raises(BudgetError) as refused:
        plan_for(tight, costs["4bit" + ON_HOST].host_bytes - 1)
    assert refused.value.smallest_bytes is not None and refused.value.smallest_bytes > tight


def with_activations(host_budget: str) -> Profile:
    """States and activations that both want the host's memory."""
    model, batch = net(num_layers=4), torch.empty(8192, 1024, device="meta")
    link = find_link(torch.device("meta"), host_budget=host_budget, known=KNOWN[HARDWARE])
    optimizer = torch.optim.AdamW(model.parameters())
    return profile(model, batch, optimizer, loss=summed, hardware=HARDWARE, link=link)


def host_bytes_of(step: Profile, made: Plan) -> int:
    """What a plan lays on the host: counted anew, from its choices and its formats."""
    costs = StepCost(step)
    moved = [moved_bytes(step, costs.groups[name], each) for name, each in treated_by(made).items() if each.is_moved]
    return sum(moved) + sum(cost.host_bytes for cost in step.optimizers if cost.formats == made.state_formats)


@pytest.mark.parametrize("host_budget", ["450MiB", pytest.param("2GiB", marks=pytest.mark.slow)])
def test_what_moves_and_states_share_the_host_s_memory(host_budget: str) -> None:
    step = with_activations(host_budget)
    solver, capacity_bytes = Solver(step), parse_bytes(host_budget)
    seen = set[str]()
    plans = [solve(step, Budget(int(share * solver.smallest_bytes))) for share in (1.0, 1.02, 1.1, 1.3)]
    costs = StepCost(step)
    for search, cost in itertools.product(solver._tightest, hosted(step).values()):
        lowest = search.lowest(cost)
        assert costs.moving(lowest.recomputed, lowest.treated).stored_bytes + cost.host_bytes <= capacity_bytes
    for made in plans:
        assert made.estimate.host_peak_bytes == host_bytes_of(step, made) <= capacity_bytes
        seen |= formats(made)
    for both in (joined(step, made, before, supersedes=False) for made in plans for before in plans):
        assert host_bytes_of(step, both) <= both.estimate.host_peak_bytes <= capacity_bytes
    assert any(name.endswith(ON_HOST) for name in seen)


def test_states_on_the_host_are_searched_for_with_all_that_may_be_done_besides() -> None:
    step = with_activations("16GiB")
    solver = Solver(step)
    budget = Budget(int(1.01 * solver.smallest_bytes))
    made, least = solve(step, budget), Solver(step).least(budget)
    assert any(name.endswith(ON_HOST) for name in formats(made)), "nothing else fits so little"
    assert made.estimate.device_peak_bytes <= budget.device_bytes < least.estimate.device_peak_bytes
    costs, on_host = StepCost(step), next(cost for cost in step.optimizers if cost.formats == made.state_formats)
    lowest = solver._tightest[1].least(on_host)
    assert made.estimate.step_seconds < costs.price(lowest.recomputed, on_host, treated=lowest.treated).seconds


def test_a_place_is_no_loss_and_a_format_counts_once() -> None:
    step = usual_step(AMPLE)
    numbers = dict(zip((cost.state_format for cost in step.optimizers), lossiness(step.optimizers), strict=True))
    assert numbers == {"fp32": 0, "fp32@host": 1, "8bit": 1, "8bit@host": 2, "4bit": 2, "4bit@host": 3}


def test_states_in_fp16_stay_where_they_are_and_scattered_gradients_count_on_the_device() -> None:
    assert not hosted(step_of(AMPLE, net().half()))
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(64, 256, 3), nn.Flatten(), nn.Linear(256 * 4, 64))
    (weight, *_) = model.parameters()
    weight.data = weight.data.to(memory_format=torch.channels_last)
    link = find_link(torch.device("meta"), host_budget=AMPLE, known=KNOWN[HARDWARE])
    batch, optimizer = torch.empty(2, 64, 4, 4, device="meta"), torch.optim.AdamW(model.parameters(), foreach=False)
    step = profile(model, batch, optimizer, loss=summed, hardware=HARDWARE, link=link)
    assert {cost.temporary_bytes for cost in hosted(step).values()} == {weight.nbytes}


def test_a_step_is_traced_without_decoding_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(256, 2).to_empty(device="cpu")
    for param in model.parameters():
        nn.init.normal_(param, std=0.02)
    optimizer, batch = torch.optim.AdamW(model.parameters()), torch.randn(4, 256)
    with adopt(optimizer, dict.fromkeys(large(model).values(), "4bit" + ON_HOST)):
        model(batch).square().mean().backward()
        optimizer.step()
        states = dict(optimizer.state)

        def refuse(*_: object) -> None:
            raise AssertionError("a state was decoded")

        with monkeypatch.context() as patch:
            patch.setattr(CompactState, "portable", refuse)
            step = profile(model, batch, optimizer, loss=summed)
        assert {cost.state_format for cost in step.optimizers} >= {"fp32", "4bit"}
        assert dict(optimizer.state) == states and list(optimizer.state) == list(states)


def test_a_saved_plan_that_takes_more_of_the_host_than_is_allowed_is_refused(tmp_path: Path) -> None:
    made = plan_for(plan_for("16GiB", AMPLE).smallest_budget_bytes, AMPLE)
    made.save(tmp_path / "plan.json")
    script = Path(__file__).parents[1] / "scripts" / "digits_convnet.py"
    options = ["run", "--plan", str(tmp_path / "plan.json"), "--host-budget", "1MiB", str(script)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 3 and "more host memory than its budget" in done.output


def test_gradients_that_are_freed_early_go_to_the_host_one_by_one() -> None:
    kept, freed = plan_for("16GiB", AMPLE), plan_for("16GiB", AMPLE, release=True)
    assert freed.smallest_budget_bytes < kept.smallest_budget_bytes
    made = plan_for(freed.smallest_budget_bytes, AMPLE, release=True)
    assert made.releases_gradients and any(name.endswith(ON_HOST) for name in formats(made))


def test_such_a_plan_is_carried_out_on_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan_for(plan_for("16GiB", AMPLE).smallest_budget_bytes, AMPLE)
    model = net().to_empty(device="cpu")
    for param in model.parameters():
        nn.init.normal_(param, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = torch.randn(4, 1024)
    cost = next(each for each in hosted(usual_step(AMPLE)).values() if each.formats == made.state_formats)
    for device, host_bytes in (("cuda", cost.host_bytes), ("cpu", 0)):  # a CPU's own memory is no other
        watch = StepWatch(model, [optimizer])
        with monkeypatch.context() as patch:
            patch.setattr(carry, "device_of", lambda _, kind=device: torch.device(kind))
            handle = adopt_formats(made, model, optimizer)
        losses = []
        for _ in range(3):
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        for _ in range(2):  # also after it is removed
            assert handle.complete(watch.measurement()).host_peak_bytes == host_bytes
            handle.remove()
        watch.close()
