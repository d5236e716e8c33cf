"""Steps that grow in mid-run because more is trained: a body is unfrozen, parameters and optimisers come later."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from packlight.budget import Budget
from packlight.measurement import Measurement
from packlight.optim.adopted_state import CompactState
from packlight.planner.guest import Guest
from packlight.planner.loop import Call
from packlight.planner.profile import profile
from packlight.planner.revise import joined
from packlight.planner.scope import MAX_TURNS, Scope
from packlight.planner.solve import solve
from tests.cases import CASES, GPT, windows
from tests.torchrun import found_by

pytestmark = pytest.mark.usefixtures("seed")

WIDTH, NUM_STEPS, FROZEN_STEPS = 64, 9, 4


def train(
    budget: int | None, *, thaws: str = "group", exact: bool = True, releases: bool = False
) -> tuple[Measurement, list[float], torch.optim.Optimizer]:
    """Train the head, then all of it; return what was measured, losses, and the optimiser.

    What is trained later becomes a group of its own then ("group"), or has been the optimiser's all the time ("there").
    """
    torch.manual_seed(3)
    model, losses = GPT(width=WIDTH, num_layers=4), list[float]()
    head = [*model.norm.parameters(), *model.head.parameters()]
    body = [each for name, each in model.named_parameters() if not name.startswith(("norm", "head"))]
    for parameter in body:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([*head, *body] if thaws == "there" else head, lr=1e-3)
    guest = Guest(budget, exact=exact, release_gradients=releases)
    with guest.during(optimizer):
        for step in range(NUM_STEPS):
            tokens = windows(4, 33)
            if step == FROZEN_STEPS:
                for parameter in body:
                    parameter.requires_grad_(True)
                if thaws == "group":
                    optimizer.add_param_group({"params": body})
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            losses.append(loss.item())
            del loss
            optimizer.step()
            optimizer.zero_grad()
        compact = [isinstance(state, CompactState) for state in optimizer.state.values()]
    assert guest.measurement is not None
    assert any(compact) == (not exact and budget is not None)
    return guest.measurement, losses, optimizer


def peak_of_all(width: int = WIDTH) -> int:
    """What a step takes when everything is trained and nothing is planned: three steps of it are measured."""
    torch.manual_seed(3)
    model = GPT(width=width, num_layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guest = Guest(None)
    with guest.during(optimizer):
        for _ in range(3):
            tokens = windows(4, 33)
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    assert guest.measurement is not None
    return guest.measurement.device_peak_bytes


@pytest.mark.parametrize("thaws", ["group", "there"])
def test_a_plan_is_made_anew_when_more_is_trained_and_the_losses_stay(
    thaws: str, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = train(None, thaws=thaws)[1]
    budget = peak_of_all() * 92 // 100
    measured, others, _ = train(budget, thaws=thaws)
    assert others == losses
    assert measured.device_peak_bytes <= budget and measured.predicted_peak_bytes is not None
    assert measured.device_peak_bytes > peak_of_all() // 2  # what the frozen steps took is far below
    assert measured.device_peak_bytes == pytest.approx(measured.predicted_peak_bytes, rel=0.02)
    assert "parameters more that get gradients" in capsys.readouterr().err


@pytest.mark.parametrize("thaws", ["group", "there"])
def test_states_of_what_is_trained_later_are_in_few_bits_as_the_new_plan_says(thaws: str) -> None:
    budget = peak_of_all() * 60 // 100
    measured, losses, optimizer = train(budget, exact=False, thaws=thaws)
    fp32_bytes = sum(8 * each.numel() for group in optimizer.param_groups for each in group["params"])
    assert measured.device_peak_bytes <= budget and measured.state_bytes < fp32_bytes // 2
    assert losses[-1] < losses[0]


def test_gradients_of_what_is_trained_later_are_released_too() -> None:
    losses = train(None, thaws="there")[1]
    budget = peak_of_all() * 80 // 100
    measured, others, _ = train(budget, thaws="there", releases=True)
    assert others == losses and measured.device_peak_bytes <= budget


def test_of_batches_that_grow_in_each_step_the_longest_one_is_what_a_run_is_expected_to_take() -> None:
    torch.manual_seed(3)
    model = GPT(width=WIDTH, num_layers=4, context=96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guest = Guest(peak_of_all() * 3 // 2, exact=True)
    with guest.during(optimizer):
        for length in (40, 64, 88):
            tokens = windows(4, length + 1)
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    measured = guest.measurement
    assert measured is not None and measured.predicted_peak_bytes is not None
    assert guest.plan is not None and guest.plan.recomputed()
    assert measured.device_peak_bytes == pytest.approx(measured.predicted_peak_bytes, rel=0.02)


def test_states_of_what_rests_are_counted_in_the_formats_that_they_have() -> None:
    torch.manual_seed(3)
    model = GPT(width=2 * WIDTH, num_layers=4)
    first, second = model.blocks[:2], model.blocks[2:]
    second.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guest = Guest(peak_of_all(2 * WIDTH) * 54 // 100)
    with guest.during(optimizer):
        for step in range(9):
            if step == 4:
                first.requires_grad_(False)
                second.requires_grad_(True)
            step_on(model, optimizer)
        held = {at: state for at, state in optimizer.state.items() if isinstance(state, CompactState)}
    assert guest.plan is not None and guest.measurement is not None
    resting = [f"blocks.{name}" for name, at in first.named_parameters() if at in held]
    assert resting and {guest.plan.state_formats[name] for name in resting} <= {"4bit", "8bit"}
    assert guest.measurement.device_peak_bytes == pytest.approx(guest.measurement.predicted_peak_bytes, rel=0.02)


def test_what_a_measured_run_takes_when_more_is_trained_is_measured() -> None:
    measured = train(None)[0]
    assert measured.num_measured_steps == 3 + 2
    assert measured.device_peak_bytes >= peak_of_all()


def test_a_short_batch_with_which_more_is_trained_does_not_stand_for_the_long_ones_before() -> None:
    torch.manual_seed(3)
    model = GPT(width=WIDTH, num_layers=4, context=96)
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guest = Guest("64MiB", exact=True)
    with guest.during(optimizer):
        for step, length in enumerate((80, 80, 80, 80, 16, 80, 80)):
            if step == 4:
                model.requires_grad_(True)
            step_on(model, optimizer, length)
    measured = guest.measurement
    assert measured is not None and measured.predicted_peak_bytes is not None
    assert measured.device_peak_bytes == pytest.approx(measured.predicted_peak_bytes, rel=0.02)


@pytest.mark.parametrize("is_made", ["before", "later"])
def test_the_first_step_of_another_optimiser_is_planned_for(is_made: str) -> None:
    torch.manual_seed(3)
    model = GPT(width=WIDTH, num_layers=4)
    body = [each for name, each in model.named_parameters() if not name.startswith(("norm", "head"))]
    head = [*model.norm.parameters(), *model.head.parameters()]
    optimizers = [torch.optim.AdamW(head, lr=1e-3)]
    optimizers += [torch.optim.AdamW(body, lr=1e-3)] if is_made == "before" else []
    guest = Guest(peak_of_all() * 75 // 100)
    with guest.during(*optimizers):
        for step in range(7):
            if step == 4 and is_made == "later":
                optimizers.append(torch.optim.AdamW(body, lr=1e-3))
            step_on(model, *optimizers)
        held = [isinstance(state, CompactState) for each in optimizers for state in each.state.values()]
    assert any(held) and guest.measurement is not None and guest.plan is not None
    assert guest.measurement.device_peak_bytes <= guest.plan.budget_bytes
    assert guest.measurement.device_peak_bytes == pytest.approx(guest.measurement.predicted_peak_bytes, rel=0.02)


def test_a_plan_that_fails_to_be_made_is_made_at_the_next_step() -> None:
    model = nn.Linear(2, 2)
    scope = Scope(Call((torch.ones(1, 2),)), model, [])
    assert scope.growth(Call((torch.ones(2, 2),))) == scope.growth(Call((torch.ones(2, 2),)))  # until it is planned for


def step_on(model: nn.Module, *args: torch.optim.Optimizer | int) -> None:
    """Train one step, on windows of a length (the last argument; 32)."""
    length = args[-1] if isinstance(args[-1], int) else 32
    optimizers = [each for each in args if isinstance(each, torch.optim.Optimizer)]
    tokens = windows(4, length + 1)
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    del loss
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


def test_replicas_agree_on_the_states_of_what_is_trained_later(tmp_path: Path) -> None:
    (first,), (second,) = found_by(2, Path(__file__).with_name("replicas.py"), "thaws", tmp_path / "thaws")
    assert first["equal"] and second["equal"]
    assert first["formats"] == second["formats"] and first["num_compact"] == second["num_compact"] > 0


def test_a_plan_that_supersedes_another_expects_its_own_peak_alone() -> None:
    case = CASES["mlp"]()
    step = profile(case.model, case.batch, torch.optim.AdamW(case.model.parameters()), loss=case.loss)
    plan = solve(step, Budget.of("1GiB"), exact=True)
    doubled = replace(plan.estimate, device_peak_bytes=2 * plan.estimate.device_peak_bytes)
    before = replace(plan, estimate=doubled)
    peaks = [joined(step, plan, before, supersedes=each).estimate.device_peak_bytes for each in (True, False)]
    assert peaks == [plan.estimate.device_peak_bytes, doubled.device_peak_bytes]


def test_what_is_trained_in_turns_is_planned_for_once_each_and_warned_of_where_turns_do_not_end() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3 * MAX_TURNS)]).requires_grad_(False)
    model[0].requires_grad_(True)
    call, grown = Call((torch.ones(1, 2),)), []
    scope = Scope(call, model, [])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for turn in [*range(1, len(model)), 0, 1]:
            model.requires_grad_(False)
            model[turn].requires_grad_(True)
            growth = scope.growth(call)
            if growth is not None:
                assert growth.is_turn and growth.told == "for 2 parameters more that get gradients"
                scope.planned(growth)
            grown.append(growth)
    assert sum(each is not None for each in grown) == MAX_TURNS and len(told) == 1
    assert "in turns" in str(told[0].message)


def test_what_is_unfrozen_layer_by_layer_is_planned_for_each_time() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3 * MAX_TURNS)]).requires_grad_(False)
    model[-1].requires_grad_(True)
    scope, call = Scope(Call((torch.ones(1, 2),)), model, []), Call((torch.ones(1, 2),))
    for layer in reversed(list(model)[:-1]):
        layer.requires_grad_(True)
        growth = scope.growth(call)
        assert growth is not None and growth.is_of_trained and not growth.is_turn and growth.num_steps == 2
        scope.planned(growth)
        assert scope.growth(call) is None


def test_batches_that_are_longer_somewhere_grow_by_their_elements_and_shorter_ones_do_not() -> None:
    scope = Scope(Call((torch.ones(4, 8),)), nn.Linear(8, 8), [])
    assert scope.growth(Call((torch.ones(3, 8),))) is None
    longer = scope.growth(Call((torch.ones(6, 8),)))
    assert longer is not None and longer.ratio == 1.5 and longer.told == "for a larger batch"
    assert not longer.supersedes  # a batch has come since
    scope.planned(longer)
    assert scope.growth(Call((torch.ones(6, 7),))) is None and scope.num_elements == 48
    wider = scope.growth(Call((torch.ones(2, 9),)))
    assert wider is not None and wider.ratio == 1.0 and not wider.supersedes
    scope.planned(wider)
    assert scope.planned_between() == 48
    longest = scope.growth(Call((torch.ones(7, 9),)))
    assert longest is not None and longest.supersedes
    scope.planned(longest)
    scope.met_optimizer()
    again = scope.growth(Call((torch.ones(4, 8),)))
    assert again is not None and again.ratio == 1.0 and again.told == "for another optimiser"
    scope.planned(again)
    assert scope.num_elements == 63  # the loss was seen to grow with that one
