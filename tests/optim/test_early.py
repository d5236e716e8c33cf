"""An existing optimiser steps inside backward: the same bits, no gradients afterwards, and nothing is lost unseen."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from packlight.optim.adopt import adopt
from packlight.optim.early import ALONE, can_update_early, update_early

NUM_STEPS = 4

pytestmark = pytest.mark.usefixtures("seed")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 160), nn.GELU(), nn.Linear(160, 160), nn.GELU(), nn.Linear(160, 4))


def batches() -> list[Tensor]:
    return [torch.randn(16, 32) for _ in range(NUM_STEPS)]


def train(model: nn.Module, optimizer: Optimizer, data: list[Tensor]) -> list[float]:
    losses, scheduler = [], torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for batch in data:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses


def twins(make: Callable[[nn.Module], Optimizer]) -> tuple[nn.Module, Optimizer, nn.Module, Optimizer]:
    first, second = net(), net()
    second.load_state_dict(first.state_dict())
    return first, make(first), second, make(second)


def states_of(optimizer: Optimizer) -> list[Tensor]:
    states = (optimizer.state[param] for group in optimizer.param_groups for param in group["params"])
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("kind", ALONE)
def test_every_bit_is_that_of_steps_after_backward(kind: type[Optimizer]) -> None:
    first, plain, second, early = twins(lambda model: kind(model.parameters(), lr=1e-3))  # type: ignore[call-arg]
    data = batches()
    losses = train(first, plain, data)
    with update_early(early):
        assert train(second, early, data) == losses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    pairs = zip(states_of(plain), states_of(early), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("state_format", ["8bit", "4bit"])
def test_compact_states_get_the_same_bits_too(state_format: str) -> None:
    first, plain, second, early = twins(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))
    data = batches()
    adopted = [
        adopt(optimizer, {at: state_format for at in model.parameters() if at.numel() > 4096})
        for model, optimizer in ((first, plain), (second, early))
    ]
    losses = train(first, plain, data)
    with update_early(early, adopted[1]):
        assert train(second, early, data) == losses
    assert all(torch.equal(a, b) for a, b in zip(states_of(plain), states_of(early), strict=True))
    for handle in adopted:
        handle.remove()


def test_each_gradient_is_gone_when_the_hooks_that_come_after_run() -> None:
    model = net()
    optimizer, alive = torch.optim.AdamW(model.parameters()), list[int]()
    with update_early(optimizer):
        hooks = [
            at.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(each.grad is not None for each in model.parameters()))
            )
            for at in model.parameters()
        ]
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()
        for hook in hooks:
            hook.remove()
    assert len(alive) == len(list(model.parameters())) and not any(alive)


def test_a_second_gradient_before_step_is_refused_and_dropped() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with update_early(optimizer):
        model(torch.randn(4, 32)).sum().backward()
        with pytest.raises(RuntimeError, match="second one came for a parameter of shape"):
            model(torch.randn(4, 32)).sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        model(torch.randn(4, 32)).sum().backward()
        optimizer.step()


def test_removed_hooks_leave_an_ordinary_optimiser() -> None:
    first, plain, second, early = twins(lambda model: torch.optim.AdamW(model.parameters()))
    handle = update_early(early)
    handle.remove()
    handle.remove()
    data = batches()
    assert train(first, plain, data) == train(second, early, data)


def test_an_optimiser_that_may_need_all_gradients_is_refused() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())
    assert "LBFGS" in (can_update_early(optimizer) or "")
    with pytest.raises(ValueError, match="cannot be released: the optimiser is a LBFGS"):
        update_early(optimizer)


def test_after_loading_a_state_dict_the_settings_are_those_of_the_new_groups() -> None:
    first, plain, second, early = twins(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))
    data = batches()

    def half_way(model: nn.Module, optimizer: Optimizer) -> list[float]:
        losses = train(model, optimizer, data[:2])
        optimizer.load_state_dict(optimizer.state_dict())
        return losses + train(model, optimizer, data[2:])

    losses = half_way(first, plain)
    with update_early(early):
        assert half_way(second, early) == losses


def test_a_setting_that_is_changed_between_backward_and_step_is_refused() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with update_early(optimizer):
        model(torch.randn(4, 32)).sum().backward()
        optimizer.param_groups[0]["lr"] = 1e-4
        with pytest.raises(RuntimeError, match="'lr' of a param group was changed between backward"):
            optimizer.step()


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1.0)


@pytest.mark.parametrize("clip", [clip_norm, clip_value])
def test_clipping_is_refused_as_long_as_gradients_are_released(clip: Callable[[nn.Module], None]) -> None:
    model, other = net(), net()
    other(torch.randn(4, 32)).sum().backward()
    with update_early(torch.optim.AdamW(model.parameters())):
        with update_early(torch.optim.AdamW(other.parameters())):
            pass
        model(torch.randn(4, 32)).sum().backward()
        with pytest.raises(RuntimeError, match="there are none to clip"):
            clip(model)
        clip(other)
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0, "torch's own again"


def test_a_grad_scaler_is_refused_before_backward() -> None:
    model = net()
    scaler, off = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)
    loss = model(torch.randn(4, 32)).sum()
    with update_early(torch.optim.AdamW(model.parameters())):
        with pytest.raises(RuntimeError, match="before a GradScaler could undo its scale"):
            scaler.scale(loss)
        assert off.scale(loss) is loss
    assert scaler.scale(loss) is not loss


def test_several_processes_are_refused(tmp_path: Path) -> None:
    start = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=start, rank=0, world_size=1)
    try:
        reason = can_update_early(torch.optim.AdamW(net().parameters()))
    finally:
        torch.distributed.destroy_process_group()
    assert reason is not None and "several processes" in reason
