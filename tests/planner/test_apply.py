"""A plan in force keeps what it promised: peak, bits of losses, formats of states; and leaves no trace."""

import copy
import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import packlight
from packlight.activations.blocks import find_blocks
from packlight.activations.engine import Engine
from packlight.budget import BudgetError
from packlight.optim.state import state_bytes
from packlight.planner.apply import apply, fit
from packlight.planner.plan import plan
from packlight.records import Choice, Plan
from tests.cases import CASES, MLP, Case

NUM_STEPS = 4
TOLERANCE = 0.01
"""Share of the estimate by which the measured peak may differ: scalars and lists that a loop makes beside the step."""

pytestmark = pytest.mark.usefixtures("seed", "no_garbage")


@pytest.fixture
def no_garbage() -> None:
    """Tensors of earlier tests that wait for the garbage collector would count until it runs."""
    gc.collect()


Optimizer = torch.optim.Optimizer


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW([at for at in model.parameters() if at.requires_grad], lr=1e-3)


def train(case: Case, optimizer: Optimizer, num_steps: int = NUM_STEPS) -> list[float]:
    """Train as a plain loop does: output and loss of a step live until the next one has its own."""
    losses = []
    for step in range(num_steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        output = case.output()
        loss = case.loss(output, case.batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def middle_budget(case: Case, *, exact: bool, share: float = 0.5) -> int:
    """Return a budget between the smallest that fits and what the unchanged step needs."""
    made = plan(case.model, case.batch, adamw(case.model), budget="50%", loss=case.loss, exact=exact)
    return int(made.smallest_budget_bytes * (1 - share) + made.estimate.plain_peak_bytes * share)


PLANNED = ["gpt", "lora", "llama", "bert", "convnet", "unet", "lstm", "flat"]


@pytest.mark.parametrize("name", PLANNED)
def test_an_exact_plan_keeps_its_budget_its_estimate_and_every_bit(name: str) -> None:
    kept = CASES[name]()
    case = Case(copy.deepcopy(kept.model), kept.batch, kept.loss)
    plain = train(kept, adamw(kept.model))
    final = [at.detach().clone() for at in kept.model.state_dict().values()]
    del kept
    gc.collect()
    budget = middle_budget(case, exact=True)
    optimizer = adamw(case.model)
    made = plan(case.model, case.batch, optimizer, budget=budget, loss=case.loss, exact=True)
    assert made.recomputed() or made.site_choices()
    with apply(made, case.model, optimizer) as handle:
        assert handle.measurement is None
        assert train(case, optimizer) == plain
        measured = handle.measurement
    assert all(torch.equal(a, b) for a, b in zip(case.model.state_dict().values(), final, strict=True))
    assert measured is not None and measured.num_steps == NUM_STEPS
    assert measured.device_peak_bytes <= budget
    assert measured.device_peak_bytes == pytest.approx(made.estimate.device_peak_bytes, rel=TOLERANCE)
    assert sum(measured.peak_by_category.values()) == measured.device_peak_bytes
    assert measured.step_seconds is not None and measured.step_seconds > 0


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_plan_with_low_bit_states_holds_just_these_bytes_and_learns(name: str) -> None:
    case = CASES[name]()
    optimizer = adamw(case.model)
    budget = middle_budget(case, exact=False, share=0.02)
    made = plan(case.model, case.batch, optimizer, budget=budget, loss=case.loss)
    assert not {"4bit", "8bit"}.isdisjoint(made.state_formats.values())
    with apply(made, case.model, optimizer) as handle:
        losses = train(case, optimizer, 8)
        measured = handle.measurement
        held_bytes = sum(at.nbytes for state in optimizer.state.values() for at in state.values())
    names = {name: at for name, at in case.model.named_parameters()}
    expected_bytes = sum(state_bytes(names[at].shape, names[at].dtype, kind) for at, kind in made.state_formats.items())
    assert measured is not None
    assert measured.state_bytes == held_bytes == expected_bytes
    assert measured.device_peak_bytes <= budget
    assert measured.device_peak_bytes == pytest.approx(made.estimate.device_peak_bytes, rel=TOLERANCE)
    assert losses[-1] < losses[0]


def test_where_states_dominate_the_low_bit_plan_keeps_its_budget() -> None:
    images, targets = torch.randn(8, 64), torch.randint(10, (8,))
    case = Case(MLP(1536), images, lambda output, _: F.cross_entropy(output, targets))
    optimizer = adamw(case.model)
    parameter_bytes = sum(at.nbytes for at in case.model.parameters())
    budget = int(3.9 * parameter_bytes)  # fp32 states take four times the parameters, and temporaries
    handle = fit(case.model, optimizer, case.batch, budget=budget, loss=case.loss)
    assert not {"4bit", "8bit"}.isdisjoint(handle.plan.state_formats.values())
    train(case, optimizer)
    measured = handle.measurement
    handle.remove()
    assert measured is not None and measured.device_peak_bytes <= budget
    assert measured.device_peak_bytes == pytest.approx(handle.plan.estimate.device_peak_bytes, rel=TOLERANCE)


def contents(model: nn.Module) -> dict[str, dict[str, object]]:
    """Describe a model's modules: their attributes by identity, their hooks by number."""
    return {
        name: {key: len(value) if "hooks" in key else id(value) for key, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }


def hooks(optimizer: Optimizer) -> list[int]:
    return [len(value) for key, value in optimizer.__dict__.items() if "hooks" in key]


def test_remove_restores_model_and_optimiser_and_decodes_the_states() -> None:
    case = CASES["gpt"]()
    optimizer = adamw(case.model)
    train(case, optimizer, 1)
    before, before_hooks, step = contents(case.model), hooks(optimizer), optimizer.step
    handle = fit(case.model, optimizer, case.batch, budget=middle_budget(case, exact=False, share=0), loss=case.loss)
    train(case, optimizer)
    assert hooks(optimizer) != before_hooks
    handle.remove()
    assert contents(case.model) == before and hooks(optimizer) == before_hooks
    assert type(optimizer) is torch.optim.AdamW and optimizer.step == step
    for parameter, state in optimizer.state.items():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == parameter.shape and state["exp_avg"].dtype == torch.float32
    handle.remove()  # again it does nothing
    train(case, optimizer)


def test_states_that_exist_before_a_plan_are_taken_over() -> None:
    case = CASES["gpt"]()
    optimizer = adamw(case.model)
    train(case, optimizer, 2)
    steps = {float(state["step"]) for state in optimizer.state.values()}
    with fit(case.model, optimizer, case.batch, budget=middle_budget(case, exact=False, share=0), loss=case.loss):
        train(case, optimizer, 2)
    assert {float(state["step"]) for state in optimizer.state.values()} == {at + 2 for at in steps}


def assert_refused(made: Plan, model: nn.Module, optimizer: Optimizer | None, *, match: str) -> None:
    before, state = contents(model), {name: at.clone() for name, at in model.state_dict().items()}
    before_hooks = hooks(optimizer) if optimizer else []
    with pytest.raises(ValueError, match=match):
        apply(made, model, optimizer)
    assert contents(model) == before
    assert all(torch.equal(at, state[name]) for name, at in model.state_dict().items())
    assert (hooks(optimizer) if optimizer else []) == before_hooks


def test_a_plan_for_another_model_is_refused_and_nothing_is_changed() -> None:
    other, case = CASES["convnet"](), CASES["gpt"]()
    made = plan(other.model, other.batch, adamw(other.model), budget=middle_budget(other, exact=True), loss=other.loss)
    assert made.recomputed() or made.site_choices()
    assert_refused(made, case.model, adamw(case.model), match="no block|no such module")


def test_a_plan_with_states_of_other_parameters_is_refused_and_nothing_is_changed() -> None:
    small, large = CASES["gpt"](), CASES["moe"]()
    made = plan(large.model, large.batch, adamw(large.model), budget="1GiB", loss=large.loss)
    assert not made.recomputed()
    assert_refused(made, small.model, adamw(small.model), match="parameter")


def test_low_bit_states_for_an_optimiser_that_cannot_keep_them_are_refused_and_nothing_is_changed() -> None:
    case = CASES["gpt"]()
    budget = middle_budget(case, exact=False, share=0.0)
    made = plan(case.model, case.batch, adamw(case.model), budget=budget, loss=case.loss)
    assert made.recomputed() and "4bit" in made.state_formats.values()
    assert_refused(made, case.model, torch.optim.SGD(case.model.parameters(), lr=0.1), match="SGD")


def test_a_second_plan_on_the_same_model_is_refused_until_the_first_is_removed() -> None:
    case = CASES["gpt"]()
    optimizer = adamw(case.model)
    made = plan(case.model, case.batch, optimizer, budget=middle_budget(case, exact=True), loss=case.loss, exact=True)
    with apply(made, case.model, optimizer):
        assert_refused(made, case.model, optimizer, match="already")
    apply(made, case.model, optimizer).remove()


def test_a_plan_that_was_saved_and_loaded_does_the_same(tmp_path: Path) -> None:
    case = CASES["bert"]()
    initial = {name: value.clone() for name, value in case.model.state_dict().items()}
    made = plan(
        *(case.model, case.batch, adamw(case.model)),
        budget=middle_budget(case, exact=False, share=0.05),
        loss=case.loss,
    )
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.to_dict() == made.to_dict() and loaded.recomputed() == made.recomputed()
    results = []
    for each in (made, loaded):
        case.model.load_state_dict(initial)
        optimizer = adamw(case.model)
        with apply(each, case.model, optimizer):
            losses = train(case, optimizer)
            sizes = [at.nbytes for state in optimizer.state.values() for at in state.values()]
            results.append((losses, sizes))
    assert results[0] == results[1]


def test_a_plan_made_on_the_meta_device_can_be_carried_out_on_the_real_model() -> None:
    case = CASES["gpt"]()
    budget = middle_budget(case, exact=True)
    shadow = copy.deepcopy(case.model).to("meta")
    made = plan(shadow, case.batch, adamw(shadow), budget=budget, loss=case.loss, exact=True)
    here = plan(case.model, case.batch, adamw(case.model), budget=budget, loss=case.loss, exact=True)
    assert made.recomputed() and made.recomputed() <= {block.path for block in find_blocks(case.model)}
    assert here.estimate.plain_peak_bytes - made.estimate.plain_peak_bytes >= 0
    with apply(made, case.model, adamw(case.model)):
        case.value().backward()


def test_without_an_optimiser_forward_and_backward_are_planned() -> None:
    case = CASES["gpt"]()
    try:
        fit(case.model, None, case.batch, budget=1, loss=case.loss)
    except BudgetError as error:  # what it names is enough also while the error itself is still at hand
        assert error.smallest_bytes is not None
        handle = fit(case.model, None, case.batch, budget=error.smallest_bytes, loss=case.loss)
    with handle:
        assert handle.plan.recomputed()
        case.value().backward()
        assert handle.measurement is None  # no optimiser ends the step


def test_a_model_under_a_plan_can_be_copied_and_pickled_as_a_plain_one(tmp_path: Path) -> None:
    case = CASES["gpt"]()
    optimizer = adamw(case.model)
    with fit(case.model, optimizer, case.batch, budget=middle_budget(case, exact=True), loss=case.loss, exact=True):
        train(case, optimizer, 1)
        copied = copy.deepcopy(case.model)
        torch.save(case.model, tmp_path / "model.pt")
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    fresh = adamw(loaded)
    fresh.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    values = [case.value(model) for model in (case.model, copied, loaded)]
    assert values[0].item() == values[1].item() == values[2].item()


def test_the_public_names_are_these_functions() -> None:
    assert (packlight.apply, packlight.fit, packlight.plan) == (apply, fit, plan)


@pytest.mark.parametrize("name", ["gpt", "convnet"])
def test_a_plan_that_was_edited_to_encode_groups_is_saved_and_carried_out(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    made = plan(case.model, case.batch, None, budget="50%", loss=case.loss)
    blocks = sorted(block.path for block in find_blocks(case.model))[1:2]
    with Engine(case.model, {"*": "keep"}) as engine:
        case.value().backward()
        sites = tuple(site for site in engine.sites() if not site.startswith(blocks[0]))
    choices = (
        *[replace(choice, choice="recompute" if choice.group in blocks else "keep") for choice in made.choices],
        Choice("all sites", "compress", 0, 0.0, codec="int8", sites=sites),
    )
    replace(made, choices=choices).save(tmp_path / "plan.json")
    edited = Plan.load(tmp_path / "plan.json")
    assert edited.choices == choices
    assert "1 held as int8" in str(edited)
    expected = gradients(case)
    with apply(edited, case.model):
        found = gradients(case)
    assert all(torch.equal(a, b) for a, b in zip(gradients(case), expected, strict=True))  # undone
    found_all, expected_all = (torch.cat([each.flatten() for each in all_]) for all_ in (found, expected))
    assert 0 < float((found_all - expected_all).norm() / expected_all.norm()) < 0.05


def gradients(case: Case) -> list[torch.Tensor]:
    torch.manual_seed(0)
    case.model.zero_grad()
    case.value().backward()
    return [parameter.grad.clone() for parameter in case.model.parameters() if parameter.grad is not None]
