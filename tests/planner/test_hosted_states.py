"""Plans for named hardware with optimiser states in host memory: counted, bounded by the host's budget, and named."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from packlight import BudgetError, Plan, plan
from packlight.optim.hosted import ON_HOST, staging_bytes
from packlight.optim.state import state_bytes
from packlight.planner.carry import adopt_formats
from packlight.planner.hardware import HOST_FORMATS
from packlight.planner.known_hardware import KNOWN
from packlight.planner.links import find_link
from packlight.planner.measure import StepWatch
from packlight.planner.profile import profile
from packlight.planner.released import released
from packlight.planner.solve import allowed_formats
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
    step = profile(model, batch, optimizer, loss=summed, hardware=HARDWARE)
    link = find_link(torch.device("meta"), host_budget=host_budget, known=KNOWN[HARDWARE])
    return dataclasses.replace(step, link=link)


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
        assert step.update_seconds(cost) == pytest.approx(cost.seconds + max(copy_seconds, kernel_seconds))
        (alone,) = (early := released(step, cost)).optimizers
        assert early.update_seconds(alone) >= cost.seconds + copy_seconds + kernel_seconds


@pytest.mark.parametrize("host_budget", [None, "1MiB"])
def test_without_room_on_the_host_states_stay(host_budget: str | None) -> None:
    step = step_of(host_budget, net())
    assert not [cost for cost in allowed_formats(step, exact=False) if cost.host_bytes]
    assert allowed_formats(step_of(AMPLE, net()), exact=True) == [step_of(AMPLE, net()).optimizers[0]]


def test_room_on_the_host_makes_smaller_budgets_possible_and_the_plan_says_what_lies_there() -> None:
    smallest = plan_for("16GiB", None).smallest_budget_bytes
    with_host = plan_for("16GiB", AMPLE)
    assert with_host.smallest_budget_bytes < smallest
    assert formats(with_host) == {"fp32"}, "where everything fits nothing is changed"
    made = plan_for(with_host.smallest_budget_bytes, AMPLE)
    (chosen,) = {name for name in formats(made) if name.endswith(ON_HOST)}
    cost = hosted(step_of(AMPLE, net()))[chosen]
    assert made.estimate.host_peak_bytes >= cost.host_bytes
    assert made.estimate.device_peak_bytes <= with_host.smallest_budget_bytes
    assert chosen in str(made)
    with pytest.raises(BudgetError):
        plan_for(with_host.smallest_budget_bytes, AMPLE, exact=True)
    assert Plan.from_dict(made.to_dict()) == made


def test_the_budget_of_the_host_bounds_which_format_lies_there() -> None:
    tight = plan_for("16GiB", AMPLE).smallest_budget_bytes
    costs = hosted(step_of(AMPLE, net()))
    for name in ("8bit" + ON_HOST, "4bit" + ON_HOST):
        made = plan_for(int(1.05 * tight), costs[name].host_bytes)
        assert made.estimate.host_peak_bytes <= costs[name].host_bytes
        assert "fp32" + ON_HOST not in formats(made)
    with pytest.raises(BudgetError) as refused:
        plan_for(tight, costs["4bit" + ON_HOST].host_bytes - 1)
    assert refused.value.smallest_bytes is not None and refused.value.smallest_bytes > tight


def test_gradients_that_are_freed_early_go_to_the_host_one_by_one() -> None:
    kept, freed = plan_for("16GiB", AMPLE), plan_for("16GiB", AMPLE, release=True)
    assert freed.smallest_budget_bytes < kept.smallest_budget_bytes
    made = plan_for(freed.smallest_budget_bytes, AMPLE, release=True)
    assert made.releases_gradients and any(name.endswith(ON_HOST) for name in formats(made))


def test_such_a_plan_is_carried_out_on_a_model() -> None:
    made = plan_for(plan_for("16GiB", AMPLE).smallest_budget_bytes, AMPLE)
    model = net().to_empty(device="cpu")
    for param in model.parameters():
        nn.init.normal_(param, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = torch.randn(4, 1024)
    cost = next(each for each in hosted(step_of(AMPLE, net())).values() if each.formats == made.state_formats)
    for device, host_bytes in (("cuda", cost.host_bytes), ("cpu", 0)):  # a CPU's own memory is no other
        watch = StepWatch(model, [optimizer])
        handle = adopt_formats(dataclasses.replace(made, device=device), model, optimizer)
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
