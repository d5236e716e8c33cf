"""Gradients that are freed inside backward: predicted to the byte, taken only where asked for, with the same bits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packlight.budget import Budget, BudgetError
from packlight.optim.adopt import adopt
from packlight.optim.early import update_early
from packlight.planner.apply import fit
from packlight.planner.cost import StepCost
from packlight.planner.loop import Seen
from packlight.planner.plan import plan
from packlight.planner.profile import profile
from packlight.planner.released import NOT_RELEASED, can_release, released, solve_releasing
from packlight.planner.solve import solve
from packlight.planner.updates import parameter_names
from packlight.step import OptimizerCost, Profile
from tests.cases import Case
from tests.planner.test_profile import DROPPED, real_peak

NUM_STEPS = 4

pytestmark = pytest.mark.usefixtures("seed")


class Deep(nn.Module):
    """Many equal layers and a small batch: parameters, gradients and states are most of the bytes."""

    def __init__(self, width: int = 96, num_layers: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


def deep_case() -> Case:
    return Case(Deep(), torch.randn(8, 96), lambda output, _: output.square().mean())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(case: Case, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(NUM_STEPS):
        loss = case.value()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def step_of(case: Case, optimizer: torch.optim.Optimizer, seen: Seen = DROPPED) -> Profile:
    return profile(case.model, case.batch, optimizer, loss=case.loss, seen=seen)


def peak_bytes(step: Profile, cost: OptimizerCost) -> int:
    return StepCost(step).price((), cost).peak_bytes


@pytest.mark.parametrize("state_format", ["fp32", "8bit", "4bit"])
def test_the_peak_is_predicted_to_the_byte_and_lower(state_format: str) -> None:
    case = deep_case()
    optimizer = adamw(case.model)
    step = step_of(case, optimizer)
    (cost,) = [each for each in step.optimizers if each.state_format == state_format]
    names = parameter_names(case.model, optimizer)
    adoption = adopt(optimizer, {at: cost.formats[name] for at, name in names.items()})
    with adoption, update_early(optimizer, adoption):
        measured, *_ = real_peak(case, optimizer)
    made = released(step, cost)
    assert peak_bytes(made, made.optimizers[0]) == measured
    assert measured < peak_bytes(step, cost)


def test_a_budget_that_needs_gradients_freed_is_kept_with_every_bit() -> None:
    plain, case = deep_case(), deep_case()
    case.model.load_state_dict(plain.model.state_dict())
    case.batch.copy_(plain.batch)
    losses = train(plain, adamw(plain.model))
    optimizer = adamw(case.model)

    def smallest_bytes(*, release_gradients: bool) -> int:
        with pytest.raises(BudgetError) as error:
            plan(
                case.model, case.batch, optimizer, budget=1, loss=case.loss, exact=True,
                release_gradients=release_gradients,
            )  # fmt: skip
        assert error.value.smallest_bytes is not None
        return error.value.smallest_bytes

    budget = smallest_bytes(release_gradients=True)
    assert budget < smallest_bytes(release_gradients=False)
    handle = fit(case.model, optimizer, case.batch, budget=budget, loss=case.loss, exact=True, release_gradients=True)
    with handle:
        assert handle.plan.releases_gradients and "gradients freed inside backward" in str(handle.plan)
        assert train(case, optimizer) == losses
        measured = handle.measurement
    assert measured is not None and measured.device_peak_bytes <= budget
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), case.model.parameters(), strict=True))
    case.value().backward()
    assert all(parameter.grad is not None for parameter in case.model.parameters()), "the handle is gone"


def test_gradients_stay_where_that_costs_nothing() -> None:
    case = deep_case()
    made = plan(case.model, case.batch, adamw(case.model), budget="1GiB", loss=case.loss, release_gradients=True)
    assert not made.releases_gradients and made.estimate.slowdown == 1


def accumulating(case: Case) -> Profile:
    return step_of(case, adamw(case.model), Seen(gradients="step", num_microbatches=2))


def stepped_together(case: Case) -> Profile:
    return step_of(case, torch.optim.Rprop(case.model.parameters()))


@pytest.mark.parametrize("make", [accumulating, stepped_together])
def test_where_gradients_cannot_be_freed_a_note_says_so(make: Callable[[Case], Profile]) -> None:
    step = make(deep_case())
    assert not can_release(step)
    made = solve_releasing(step, Budget(2**30))
    assert not made.releases_gradients and NOT_RELEASED in made.notes


def test_a_backward_that_runs_out_of_memory_is_not_done_twice() -> None:
    case = deep_case()
    optimizer = adamw(case.model)
    with pytest.raises(BudgetError) as refused:
        plan(case.model, case.batch, optimizer, budget=1, loss=case.loss, exact=True, release_gradients=True)
    budget = refused.value.smallest_bytes
    assert budget is not None
    with fit(case.model, optimizer, case.batch, budget=budget, loss=case.loss, exact=True, release_gradients=True):
        loss = case.value()

        def fail(_: Tensor) -> None:
            raise torch.OutOfMemoryError("no room")

        case.model.layers[0].weight.register_hook(fail)  # type: ignore[index, union-attr]
        with pytest.raises(torch.OutOfMemoryError) as error:
            loss.backward()
        assert any("parameters are stepped inside it" in note for note in error.value.__notes__)
    del loss


class Looks(nn.Module):
    """Reads a parameter of the last layer in its first block, past autograd."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.SiLU()) for _ in range(4))
        self.first, self.detached = Reading(self.layers[3], detached=detached), detached

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Reading(nn.Module):
    """A block that adds the sum of another's weight."""

    def __init__(self, other: nn.Module, *, detached: bool) -> None:
        super().__init__()
        self.linear, self.act, self.detached = nn.Linear(64, 64), nn.SiLU(), detached
        self.others = [other]  # in a list, so that it is no child

    def forward(self, x: Tensor) -> Tensor:
        weight = next(self.others[0].parameters())
        out: Tensor = self.act(self.linear(x)) * (weight.detach() if self.detached else weight).sum()
        return out


@pytest.mark.parametrize("detached", [False, True])
def test_a_parameter_that_a_block_reads_past_autograd_keeps_gradients_where_they_are(detached: bool) -> None:
    case = Case(Looks(detached=detached), torch.randn(8, 64), lambda output, _: output.sum())
    assert can_release(step_of(case, adamw(case.model))) == (not detached)


def test_groups_with_other_settings_count_with_what_their_steps_allocate() -> None:
    case = deep_case()
    weights = [at for at in case.model.parameters() if at.dim() > 1]
    others = [at for at in case.model.parameters() if at.dim() == 1]
    groups = [{"params": weights[:1], "momentum": 0.0}, {"params": weights[1:] + others, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=1e-3, weight_decay=0.1)
    step = step_of(case, optimizer)
    (cost,) = step.optimizers
    with update_early(optimizer):
        measured, *_ = real_peak(case, optimizer)
    assert measured <= peak_bytes(released(step, cost), released(step, cost).optimizers[0]) <= 1.02 * measured


def test_the_smallest_budget_is_that_of_all_ways() -> None:
    case = deep_case()
    step = step_of(case, adamw(case.model))
    with pytest.raises(BudgetError) as error:
        solve_releasing(step, Budget(1))
    least = error.value.smallest_bytes
    assert least is not None and solve_releasing(step, Budget(2**30)).smallest_budget_bytes == least
    assert solve_releasing(step, Budget(least)).releases_gradients
    with pytest.raises(BudgetError):
        solve(step, Budget(least))
