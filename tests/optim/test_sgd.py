"""packlight's SGD has a momentum buffer in few bits, and none without momentum."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packlight.numerics import FORMATS, decode
from packlight.optim import SGD
from packlight.optim.state import MOMENTUM, nbytes, stored_moments
from tests.cases import ConvNet, digits

# Half the widest gap between two values, of the block's largest magnitude: NF4's lies between -1 and -.696;
# softsign's is half of 1/127 at a slope of 2, and its bf16 scale is up to 2^-7 too large; E4M3's is 2^-4.
ROUNDING_ERROR = {"fp32": 0.0, "4bit": 0.1520, "8bit": 1 / 127 + 2.0**-7, "fp8": 2.0**-4}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *, num_steps: int, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    losses = []
    for _ in range(num_steps):
        images, targets = digits(64)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images.to(next(net.parameters()).dtype)).float(), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def model(seed: int) -> ConvNet:
    torch.manual_seed(seed)
    return ConvNet(32)


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_bytes_are_the_same_before_and_after_the_first_step(
    state_format: str, momentum: float, dtype: torch.dtype, seed: int
) -> None:
    net = model(seed).to(dtype)
    optimizer = SGD(net.parameters(), momentum=momentum, state_format=state_format, bf16_rounding="master24")
    expected = optimizer.state_bytes()
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert expected == optimizer.state_bytes() == sum(map(nbytes, optimizer.state.values()))


def test_without_momentum_a_state_is_its_step_count(seed: int) -> None:
    net = model(seed)
    optimizer = SGD(net.parameters())
    train(net, optimizer, num_steps=2)
    assert {tuple(state) for state in optimizer.state.values()} == {("step",)}
    assert optimizer.state_bytes() == 4 * len(list(net.parameters()))


def test_without_momentum_all_formats_are_one(seed: int) -> None:
    nets = [model(seed) for _ in FORMATS]
    for net, state_format in zip(nets, FORMATS, strict=True):
        train(net, SGD(net.parameters(), lr=0.1, weight_decay=1e-3, state_format=state_format), num_steps=3)
    assert all(same(nets[0], net) for net in nets)


@pytest.mark.parametrize("state_format", ROUNDING_ERROR)
def test_buffer_is_off_by_no_more_than_its_format_rounds(state_format: str, seed: int) -> None:
    momentum, gradients = 0.9, torch.randn(8, 100, 70)
    param = nn.Parameter(torch.zeros(100, 70))
    optimizer = SGD([param], lr=0.1, momentum=momentum, state_format=state_format)
    exact, bound = torch.zeros(100, 70), 0.0
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
        exact = momentum * exact + gradient
        # What was off before is scaled by the momentum; then the sum, off by as much, is rounded.
        bound = momentum * bound
        bound += ROUNDING_ERROR[state_format] * (float(exact.abs().max()) + bound) + 1e-5
        (moment,) = stored_moments(optimizer.state[param], (100, 70), state_format, moments=MOMENTUM)
        assert float((decode(moment) - exact).abs().max()) <= bound


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5}, {"maximize": True}], ids=str)
def test_real_training_in_fp32_is_torchs(options: dict[str, Any], seed: int) -> None:
    ours, theirs = model(seed), model(seed)
    lr = -0.02 if "maximize" in options else 0.02
    settings: dict[str, Any] = {"lr": abs(lr), "momentum": 0.9, "weight_decay": 1e-4, **options}
    train(ours, SGD(ours.parameters(), **settings, state_format="fp32"), num_steps=3)
    train(theirs, torch.optim.SGD(theirs.parameters(), **settings), num_steps=3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # a rounding may turn a ReLU at zero, and with it one image's share of a gradient
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("state_format", ["4bit", "8bit", "fp8"])
def test_real_training_learns_as_fast_as_in_fp32(state_format: str, seed: int) -> None:
    losses = {}
    for name in ("fp32", state_format):
        net = model(0)
        losses[name] = train(net, SGD(net.parameters(), lr=0.05, momentum=0.9, state_format=name), num_steps=15, seed=1)
    print(losses)
    assert losses[state_format][-1] < 0.6 * losses[state_format][0]
    assert sum(losses[state_format][-5:]) == pytest.approx(sum(losses["fp32"][-5:]), rel=0.15)


def test_first_step_fills_the_buffer_with_the_whole_gradient_despite_dampening() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([1.0, -2.0, 4.0])
    optimizer = SGD([param], lr=0.5, momentum=0.9, dampening=0.5)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], param.grad)
    assert torch.equal(param.detach(), -0.5 * param.grad)


@pytest.mark.parametrize("state_format", ["fp32", "4bit"])
def test_momentum_that_is_switched_on_later_starts_its_buffer_then(state_format: str, seed: int) -> None:
    found: list[Tensor] = []
    kinds: tuple[Callable[..., torch.optim.Optimizer], ...] = (
        torch.optim.SGD,
        lambda *args, **options: SGD(*args, **options, state_format=state_format),
    )
    for make in kinds:
        param = nn.Parameter(torch.zeros(100, 70))
        optimizer = make([param], lr=0.5)
        for momentum in (0.0, 0.5):
            optimizer.param_groups[0]["momentum"] = momentum
            param.grad = torch.ones(100, 70)
            optimizer.step()
        found.append(param.detach())
    assert torch.equal(*found)  # ones are exact in every format


def test_momentum_that_is_switched_off_is_plain_descent(seed: int) -> None:
    param = nn.Parameter(torch.zeros(100, 70))
    optimizer = SGD([param], lr=0.5, momentum=0.9)
    for momentum in (0.9, 0.0):
        optimizer.param_groups[0]["momentum"] = momentum
        param.grad = torch.ones(100, 70)
        optimizer.step()
    assert torch.equal(param.detach(), -torch.ones(100, 70))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"momentum": -0.1}, "momentum"),
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening"),
        ({"state_format": "5bit"}, "'5bit'"),
        ({"bf16_rounding": "master16"}, "master16"),
    ],
    ids=str,
)
def test_option_out_of_its_range_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SGD([torch.zeros(3)], **options)


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_or_infinity_shows_in_the_parameter(state_format: str, bad: float, seed: int) -> None:
    param = nn.Parameter(torch.randn(100, 70))
    optimizer = SGD([param], lr=0.1, momentum=0.9, state_format=state_format)
    for step in range(3):
        param.grad = torch.randn(100, 70)
        if step == 1:
            param.grad[3, 5] = bad
        optimizer.step()
        assert bool(param[3, 5].isfinite()) is (step == 0)
    elements = {"fp32": 1, "8bit": 32}.get(state_format, 128)
    assert int((~param.isfinite()).sum()) == elements  # the block of the first moment that it is in
