"""Plans fit their budget, are the fastest that do, and a refusal names the budget that would be enough."""

import functools
import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from packlight.budget import Budget, BudgetError
from packlight.planner.cost import StepCost
from packlight.planner.loop import Seen
from packlight.planner.outcome import treated_by
from packlight.planner.plan import device_bytes, plan
from packlight.planner.profile import profile
from packlight.planner.program import GAP, LOSS_SHARE, Found, Program
from packlight.planner.search import MAX_SECONDS
from packlight.planner.solve import HEADROOM, LOADED_BATCHES, solve
from packlight.records import Plan
from packlight.step import OptimizerCost, Profile
from tests.cases import CASES, MLP

NUM_BUDGETS = 7
NEARLY_BEST = 1 + GAP + 4 * LOSS_SHARE
"""A plan's time over that of the best: the solver ends within the gap, and codes, formats and a tier have to spare."""

pytestmark = pytest.mark.usefixtures("seed")


@functools.cache
def step_of(name: str) -> Profile:
    case = CASES[name]()
    optimizer = torch.optim.AdamW([at for at in case.model.parameters() if at.requires_grad])
    return profile(case.model, case.batch, optimizer, loss=case.loss, seen=Seen(held_outputs=(), carries_outputs=False))


def spare_bytes(step: Profile) -> int:
    return LOADED_BATCHES * step.batch_bytes


def allowed_bytes(step: Profile, budget_bytes: int) -> int:
    """What the step itself may take of a budget: less the headroom and the loader's next batches."""
    return int(budget_bytes * (1 - HEADROOM)) - spare_bytes(step)


def smallest_bytes(step: Profile, *, exact: bool = False) -> int:
    with pytest.raises(BudgetError) as error:
        solve(step, Budget(1), exact=exact)
    assert error.value.smallest_bytes is not None
    return error.value.smallest_bytes


def plain_bytes(step: Profile) -> int:
    """The least budget for which nothing has to be changed."""
    peak_bytes = StepCost(step).price((), step.optimizers[0]).peak_bytes
    return math.ceil((peak_bytes + spare_bytes(step)) / (1 - HEADROOM)) + 1


def budgets(step: Profile, *, exact: bool = False) -> list[int]:
    least, most = smallest_bytes(step, exact=exact), plain_bytes(step)
    return [least + (most - least) * at // (NUM_BUDGETS - 1) for at in range(NUM_BUDGETS)]


def slowdown(made: Plan) -> float:
    """A plan that is faster than the training as it is does not count as better."""
    return max(made.estimate.slowdown, 1.0)


def chosen_format(step: Profile, made: Plan) -> OptimizerCost:
    (found,) = [cost for cost in step.optimizers if dict(cost.formats) == dict(made.state_formats)]
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("exact", [False, True])
def test_plans_fit_and_a_larger_budget_slows_training_down_no_more(name: str, exact: bool) -> None:
    step = step_of(name)
    last, least = math.inf, smallest_bytes(step, exact=exact)
    for budget_bytes in budgets(step, exact=exact):
        made = solve(step, Budget(budget_bytes), exact=exact)
        assert made.estimate.device_peak_bytes <= allowed_bytes(step, budget_bytes)
        assert slowdown(made) <= last * (1 + GAP if exact else NEARLY_BEST)
        last = slowdown(made)
        priced = StepCost(step).price(made.recomputed(), chosen_format(step, made), treated=treated_by(made))
        assert (priced.peak_bytes, priced.seconds) == (made.estimate.device_peak_bytes, made.estimate.step_seconds)
        assert sum(made.estimate.peak_by_category.values()) == made.estimate.device_peak_bytes
        assert made.budget_bytes == budget_bytes and made.exact == exact
        assert made.smallest_budget_bytes == least


@pytest.mark.parametrize("name", CASES)
def test_each_recomputed_block_is_needed(name: str) -> None:
    step = step_of(name)
    costs = StepCost(step)
    for budget_bytes in budgets(step):
        made = solve(step, Budget(budget_bytes))
        for block in made.recomputed():
            without = costs.price(made.recomputed() - {block}, chosen_format(step, made), treated=treated_by(made))
            assert without.peak_bytes > allowed_bytes(step, budget_bytes), f"{block} need not be recomputed"


@pytest.mark.parametrize("name", CASES)
def test_no_choice_of_blocks_is_faster_or_takes_less(name: str) -> None:
    step = step_of(name)
    costs, blocks = StepCost(step), sorted(StepCost(step).saving_blocks())
    subsets = itertools.chain.from_iterable(itertools.combinations(blocks, at) for at in range(len(blocks) + 1))
    priced = [costs.price(subset, optimizer) for subset in subsets for optimizer in step.optimizers]
    least_bytes = min(cost.peak_bytes for cost in priced)
    assert smallest_bytes(step) <= math.ceil((least_bytes + spare_bytes(step)) / (1 - HEADROOM))
    for budget_bytes in budgets(step):
        fitting = [cost.seconds for cost in priced if cost.peak_bytes <= allowed_bytes(step, budget_bytes)]
        made = solve(step, Budget(budget_bytes))
        plain_seconds = costs.price((), step.optimizers[0]).seconds
        assert made.estimate.step_seconds <= NEARLY_BEST * max(min(fitting, default=math.inf), plain_seconds)


@pytest.mark.parametrize("name", CASES)
def test_states_stay_exact_where_that_costs_no_time(name: str) -> None:
    step = step_of(name)
    made = solve(step, Budget(2 * plain_bytes(step)))
    assert set(made.state_formats.values()) == {step.optimizers[0].state_format}
    assert not made.recomputed() and made.estimate.slowdown == 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_refusal_names_the_smallest_budget_and_a_plan_for_exactly_that_exists(name: str, exact: bool) -> None:
    step = step_of(name)
    least = smallest_bytes(step, exact=exact)
    made = solve(step, Budget(least), exact=exact)
    assert made.budget_bytes == least == made.smallest_budget_bytes
    with pytest.raises(BudgetError, match=rf"\b{least} bytes\b") as error:
        solve(step, Budget(least - 1), exact=exact)
    assert error.value.smallest_bytes == least
    assert ("choices that are not exact" in str(error.value)) == exact


def test_formats_that_no_parameter_is_large_enough_for_are_no_choice() -> None:
    assert [cost.state_format for cost in step_of("convnet").optimizers] == ["fp32"]
    assert [cost.state_format for cost in step_of("gpt").optimizers] == ["fp32", "8bit", "4bit"]
    assert [cost.state_format for cost in step_of("tied").optimizers] == ["fp32", "8bit"], "all is an embedding"


@pytest.mark.parametrize("name", CASES)
def test_where_everything_fits_nothing_is_changed(name: str) -> None:
    made = solve(step_of(name), Budget(plain_bytes(step_of(name))), exact=True)
    assert not made.recomputed()
    assert set(made.state_formats.values()) <= {"fp32"}
    assert made.estimate.slowdown == 1.0
    assert made.estimate.plain_peak_bytes == made.estimate.device_peak_bytes


@pytest.mark.parametrize("name", ["gpt", "llama", "translator"])
def test_exact_plans_leave_the_states_in_fp32_at_every_budget(name: str) -> None:
    step = step_of(name)
    assert smallest_bytes(step) < smallest_bytes(step, exact=True)
    for budget_bytes in budgets(step, exact=True):
        assert set(solve(step, Budget(budget_bytes), exact=True).state_formats.values()) == {"fp32"}


def test_where_states_are_most_of_the_bytes_low_bit_states_are_chosen_unless_exact_is_asked() -> None:
    model = MLP(2048)  # and a batch of 4: hardly any activations
    step = profile(model, torch.randn(4, 64), torch.optim.AdamW(model.parameters()), loss=lambda out, _: out.sum())
    budget = Budget(int(plain_bytes(step) * 0.8))
    made = solve(step, budget)
    assert not {"4bit", "8bit"}.isdisjoint(made.state_formats.values())
    assert not made.recomputed()
    with pytest.raises(BudgetError):
        solve(step, budget, exact=True)


@pytest.mark.parametrize("name", CASES)
def test_choices_are_the_blocks_that_hold_bytes_once_each(name: str) -> None:
    step = step_of(name)
    for budget_bytes in budgets(step)[::3]:
        made = solve(step, Budget(budget_bytes))
        blocks = [choice.group for choice in made.choices if not choice.sites]
        assert len(blocks) == len(set(blocks)) and set(blocks) == set(StepCost(step).saving_blocks())
        for choice in made.choices:
            assert choice.bytes > 0
            assert choice.choice in (("compress",) if choice.sites else ("keep", "recompute"))
            assert (choice.seconds > 0) == (choice.choice != "keep")
        plain_seconds = StepCost(step).price((), chosen_format(step, made)).seconds
        added_seconds = sum(choice.seconds for choice in made.choices)
        if any(choice.choice == "compress" for choice in made.choices):  # the engine looks on, at what is kept too
            added_seconds += step.hook_seconds
        assert made.estimate.step_seconds == pytest.approx(plain_seconds + added_seconds)


def test_an_optimiser_that_is_not_known_keeps_its_states_as_they_are() -> None:
    case = CASES["gpt"]()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1, momentum=0.9)
    step = profile(case.model, case.batch, optimizer, loss=case.loss)
    made = solve(step, Budget(smallest_bytes(step)))
    assert set(made.state_formats.values()) == {"as is"}


def test_without_an_optimiser_a_plan_has_no_states() -> None:
    case = CASES["gpt"]()
    made = plan(case.model, case.batch, None, budget="1GiB", loss=case.loss)
    assert made.state_formats == {} and made.estimate.peak_by_category["optimizer_states"] == 0


def test_gradient_accumulation_costs_its_recomputation_each_time() -> None:
    case = CASES["gpt"]()
    made = []
    for num_microbatches in (1, 4):
        seen = Seen(gradients="step", num_microbatches=num_microbatches)
        step = profile(case.model, case.batch, None, loss=case.loss, seen=seen)
        costs = StepCost(step)
        made.append((costs.recompute_seconds("blocks.0") / step.seconds, costs.price((), None).seconds / step.seconds))
    (once, plain_once), (four_times, plain_four_times) = made
    assert plain_four_times == pytest.approx(4 * plain_once)
    assert four_times == pytest.approx(4 * once, rel=0.01)


@pytest.mark.parametrize("budget", ["0", -5, "much", "1.5.2GiB", True, "0%", None])
def test_a_budget_that_cannot_be_read_is_refused(budget: object) -> None:
    case = CASES["mlp"]()
    with pytest.raises(ValueError, match="budget"):
        plan(case.model, case.batch, None, budget=budget, loss=case.loss)  # type: ignore[arg-type]


def test_a_budget_larger_than_the_device_is_refused_and_a_share_of_it_is_read() -> None:
    case = CASES["mlp"]()
    total_bytes = device_bytes(torch.device("cpu"))
    with pytest.raises(ValueError, match="the device has"):
        plan(case.model, case.batch, None, budget=total_bytes + 1, loss=case.loss)
    made = plan(case.model, case.batch, None, budget="50%", loss=case.loss)
    assert made.budget_bytes == total_bytes // 2


def test_planning_runs_nothing_and_changes_nothing_of_the_model() -> None:
    calls: list[nn.Module] = []
    case = CASES["gpt"]()
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    made = plan(case.model, case.batch, torch.optim.AdamW(case.model.parameters()), budget="3MB", loss=case.loss)
    handle.remove()
    assert made.recomputed()
    assert not set(calls) & set(case.model.modules()), "a module of the model itself ran"
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())
    assert all(parameter.grad is None for parameter in case.model.parameters())


@pytest.mark.parametrize("name", ["gpt", "convnet"])
def test_where_no_choice_is_found_in_time_more_time_is_taken_before_the_lowest_peak_is(name: str) -> None:
    step, found, limits = step_of(name), Program.solve, []
    budget = Budget.of((smallest_bytes(step) + plain_bytes(step)) // 2, total_bytes=2**40)

    def hurried(program: Program, *, allowed_bytes: int | None, limit_seconds: float, **options: Any) -> Found | None:
        limits.append(limit_seconds)
        if allowed_bytes is not None and limit_seconds <= MAX_SECONDS / 2:
            return None
        return found(program, allowed_bytes=allowed_bytes, limit_seconds=limit_seconds, **options)

    with mock.patch.object(Program, "solve", hurried):
        made = solve(step, budget)
    assert max(limits) > MAX_SECONDS / 2
    assert slowdown(made) == pytest.approx(slowdown(solve(step, budget)))
    assert made.estimate.device_peak_bytes <= budget.device_bytes
