"""Scaling by a GradScaler and clipping are folded into the step, and change nothing else."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packlight.numerics import FORMATS
from packlight.optim import SGD, Adam, AdamW
from tests.cases import GPT, NUM_BYTES, windows

KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "Adam with decay": (Adam, {"weight_decay": 0.1}),
    "AdamW maximizing": (AdamW, {"maximize": True}),
    "SGD": (SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
}


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(width=64, num_layers=1)


def made(kind: str, net: nn.Module, state_format: str = "4bit") -> Any:
    cls, options = KINDS[kind]
    return cls(net.parameters(), lr=1e-2, state_format=state_format, **options)  # type: ignore[call-arg]


def loss_of(net: nn.Module, step: int) -> Tensor:
    torch.manual_seed(step)
    tokens = windows(4, 32)
    return F.cross_entropy(net(tokens)[:, :-1].reshape(-1, NUM_BYTES), tokens[:, 1:].reshape(-1))


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [tensor for param in net.parameters() for tensor in optimizer.state[param].values()]
    return [tensor.detach().clone() for tensor in (*net.parameters(), *states)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_grad_scaler_changes_no_bit_and_skips_infinities(kind: str, state_format: str, unscale: bool) -> None:
    net, plain = gpt(), gpt()
    optimizer, own = made(kind, net, state_format), made(kind, plain, state_format)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, step)).backward()
        before = everything(net, optimizer) if step == 2 else []
        if step == 2:
            assert net.head.weight.grad is not None
            net.head.weight.grad[3, 3] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert same(everything(net, optimizer), before)
            continue
        own.zero_grad()
        loss_of(plain, step).backward()
        own.step()
        assert same(everything(net, optimizer), everything(plain, own))
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
    assert scaler.get_scale() == 2.0**11


def test_infinity_at_the_very_first_step_leaves_parameters_and_zero_states() -> None:
    net, plain = gpt(), gpt()
    optimizer, own = made("AdamW", net), made("AdamW", plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, step)).backward()
        if step == 0:
            assert net.head.weight.grad is not None
            net.head.weight.grad[0, 0] = torch.nan
        scaler.step(optimizer)
        scaler.update()
        if step:
            own.zero_grad()
            loss_of(plain, step).backward()
            own.step()
    assert same(everything(net, optimizer), everything(plain, own))


def test_disabled_grad_scaler_is_not_there() -> None:
    net, plain = gpt(), gpt()
    optimizer, own = made("AdamW", net), made("AdamW", plain)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for model, one in ((net, optimizer), (plain, own)):
        loss_of(model, 0).backward()
        scaler.step(one) if one is optimizer else one.step()
    assert same(everything(net, optimizer), everything(plain, own))


def test_grad_scalers_marks_are_gone_after_the_step() -> None:
    net = gpt()
    optimizer = made("AdamW", net)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, 0)).backward()
    scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_power_of_two_as_clip_coefficient_is_scaling_by_hand_bit_for_bit(
    kind: str, state_format: str, as_tensor: bool
) -> None:
    net, plain = gpt(), gpt()
    optimizer, own = made(kind, net, state_format), made(kind, plain, state_format)
    for step, coefficient in enumerate((0.125, 0.5, 2.0**-10)):
        for model, one in ((net, optimizer), (plain, own)):
            one.zero_grad()
            loss_of(model, step).backward()
        for param in plain.parameters():
            assert param.grad is not None
            param.grad *= coefficient
        own.step()
        optimizer.step(clip_coefficient=torch.tensor(coefficient) if as_tensor else coefficient)
    assert same(everything(net, optimizer), everything(plain, own))


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_by_the_norm_is_torchs_but_for_rounding(kind: str, seed: int) -> None:
    params = [[nn.Parameter(torch.zeros(shape)) for shape in [(80, 70), (70,)]] for _ in range(2)]
    optimizers = [KINDS[kind][0](each, lr=1.0, state_format="fp32", **KINDS[kind][1]) for each in params]  # type: ignore[call-arg]
    ours: Any = optimizers[0]
    for _ in range(5):
        gradients = [torch.randn(param.shape) for param in params[0]]
        for each in params:
            for param, gradient in zip(each, gradients, strict=True):
                param.grad = gradient.clone()
        norm = nn.utils.get_total_norm(gradients)
        ours.step(clip_coefficient=(0.1 / (norm + 1e-6)).clamp(max=1.0))
        nn.utils.clip_grad_norm_(params[1], 0.1)
        optimizers[1].step()
    for a, b in zip(*params, strict=True):
        # Per step a handful of operations rounded to 2^-24 of numbers as large as the parameters.
        assert float((a - b).detach().abs().max()) <= 5 * 16 * 2.0**-24 * float(b.detach().abs().max())


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"clip_coefficient": 0.3}], ids=str)
def test_gradients_are_only_read(kind: str, state_format: str, options: dict[str, float]) -> None:
    net = gpt()
    optimizer = made(kind, net, state_format)
    loss_of(net, 0).backward()
    gradients = [param.grad for param in net.parameters()]
    before = copy.deepcopy(gradients)
    optimizer.step(**options)
    assert all(param.grad is gradient for param, gradient in zip(net.parameters(), gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True) if a is not None and b is not None)


def test_clip_coefficient_and_grad_scaler_go_together() -> None:
    net, plain = gpt(), gpt()
    optimizer, own = made("AdamW", net), made("AdamW", plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss_of(net, 0)).backward()
    scaler.step(optimizer, clip_coefficient=0.25)
    loss_of(plain, 0).backward()
    own.step(clip_coefficient=0.25)
    assert same(everything(net, optimizer), everything(plain, own))


def test_coefficient_of_zero_is_a_gradient_of_zero() -> None:
    param = nn.Parameter(torch.ones(80, 70))
    param.grad = torch.ones(80, 70)
    AdamW([param], weight_decay=0.0).step(clip_coefficient=0.0)
    assert torch.equal(param.detach(), torch.ones(80, 70))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_coefficient_that_is_no_number_shows_in_the_parameters(as_tensor: bool) -> None:
    param = nn.Parameter(torch.ones(80, 70))
    param.grad = torch.ones(80, 70)
    nan = float("nan")
    AdamW([param]).step(clip_coefficient=torch.tensor(nan) if as_tensor else nan)
    assert bool(param.isnan().all())
