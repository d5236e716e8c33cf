"""Loops whose forward and backward stand in a closure that the optimiser calls, as Lightning's do."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from packlight.measurement import Measurement
from packlight.planner.guest import Guest
from tests.cases import GPT, windows

pytestmark = pytest.mark.usefixtures("seed")

WIDTH, NUM_STEPS = 64, 5


def train(budget: int | None, *, exact: bool = False, has_closure: bool = True) -> tuple[Measurement, list[float]]:
    """Train under a session; return what it measured, and the losses."""
    torch.manual_seed(3)
    model, losses = GPT(width=WIDTH, num_layers=4), list[float]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = [windows(4, 33) for _ in range(NUM_STEPS)]
    guest = Guest(budget, exact=exact)
    with guest.during(optimizer):
        for tokens in batches:

            def closure(tokens: torch.Tensor = tokens) -> torch.Tensor:
                optimizer.zero_grad()
                logits = model(tokens[:, :-1])
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                loss.backward()
                losses.append(loss.item())
                return loss

            step(optimizer, closure, has_closure=has_closure)
    assert not _get_current_dispatch_mode_stack()
    assert guest.measurement is not None
    return guest.measurement, losses


def step(optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor], *, has_closure: bool) -> None:
    if has_closure:
        optimizer.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        optimizer.step()


def test_a_closures_step_is_measured_as_the_same_step_without_one() -> None:
    (inside, losses), (plain, others) = (train(None, has_closure=each) for each in (True, False))
    assert losses == others
    assert inside.device_peak_bytes == plain.device_peak_bytes
    assert inside.peak_by_category == plain.peak_by_category and inside.state_bytes == plain.state_bytes


def test_states_are_in_few_bits_from_a_closures_first_step_on_and_the_budget_is_kept() -> None:
    measured, _ = train(None)
    fp32_bytes = measured.state_bytes
    budget = measured.device_peak_bytes - fp32_bytes // 2 - measured.peak_by_category["activations"] // 2
    (inside, losses), (plain, others) = (train(budget, has_closure=each) for each in (True, False))
    assert inside.state_bytes == plain.state_bytes < fp32_bytes // 2
    assert inside.device_peak_bytes <= budget and plain.device_peak_bytes <= budget
    assert losses == others


def test_an_exact_plan_leaves_a_closures_losses_as_they_are() -> None:
    measured, losses = train(None)
    budget = measured.device_peak_bytes - measured.peak_by_category["activations"] // 4
    planned, others = train(budget, exact=True)
    assert others == losses and planned.device_peak_bytes <= budget
