"""The reference is torch's arithmetic where nothing is rounded, in bounded temporaries, for any strides and dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from packlight.numerics import FORMATS, AdamWSettings, SGDSettings, decode, reference
from packlight.numerics.reference import CPU_CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS
from tests.numerics.cases import (
    COMPILED,
    NONFINITE,
    SHAPES,
    PeakBytes,
    Trained,
    adamw,
    differing,
    from_bits,
    gradient,
    sgd,
)

MIB = 2**20
#: Roundings of an update on both sides, each of half a unit in the last place.
ROUNDINGS = 16 * 2.0**-24


# torch's arithmetic


@pytest.mark.parametrize(
    "options",
    [
        # A large eps where a denominator can be tiny beside what its numerator's terms were: it would show their ulps.
        {"weight_decay": 0.1, "eps": 1e-3},
        {"weight_decay": 0.1, "eps": 1e-3, "maximize": True},
        {"maximize": True},
        {"betas": (0.0, 0.99)},
        {"betas": (0.9, 0.0), "eps": 0.1},
        {"betas": (0.95, 0.9999), "eps": 1e-3},
        {"lr": 0.0, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("shape", [(), (7,), (769, 403)])
def test_an_fp32_step_is_torchs(
    shape: tuple[int, ...], kind: type[torch.optim.Adam], options: dict[str, Any], seed: int
) -> None:
    ours = Trained(torch.randn(shape), "fp32")
    theirs = torch.nn.Parameter(ours.param.clone())
    lr, num_steps = options.get("lr", 1e-2), 10
    optimizer = kind([theirs], **{"lr": lr, "weight_decay": 0.0, **options})
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    rest = {name: value for name, value in options.items() if name not in ("betas", "lr")}
    settings = AdamWSettings(lr, beta1, beta2, decoupled=kind is torch.optim.AdamW, **rest)
    travelled = torch.zeros(shape)
    for step in range(1, num_steps + 1):
        before = theirs.detach().clone()
        theirs.grad = gradient(shape) + 0.1
        optimizer.step()
        adamw([ours], [theirs.grad], step, settings)
        travelled += (theirs.detach() - before).abs() + before.abs() / 4  # the parameter itself rounds twice
    assert bool(((ours.param - theirs.detach()).abs() <= ROUNDINGS * (travelled + num_steps * lr)).all())
    state = optimizer.state[theirs]
    for moment, name in zip(ours.moments, ("exp_avg", "exp_avg_sq"), strict=True):
        # Absolute: where gradients cancel, a unit in the last place is that of the largest.
        largest = float(state[name].abs().max()) * 4 + 4 * float(theirs.detach().abs().max()) * 0.1
        assert float((decode(moment) - state[name]).abs().max()) <= num_steps * ROUNDINGS * largest


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.3, "maximize": True},
        {"momentum": 0.5, "dampening": 0.1, "weight_decay": 0.2, "maximize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (7,), (769, 403)])
def test_an_fp32_step_of_sgd_is_torchs(shape: tuple[int, ...], options: dict[str, Any], seed: int) -> None:
    ours = Trained(torch.randn(shape), "fp32", num_moments=1 if "momentum" in options else 0)
    theirs = torch.nn.Parameter(ours.param.clone())
    optimizer = torch.optim.SGD([theirs], lr=0.1, **options)
    for step in range(1, 11):
        theirs.grad = gradient(shape)
        optimizer.step()
        sgd([ours], [theirs.grad], step, SGDSettings(0.1, **options))
    torch.testing.assert_close(ours.param, theirs.detach(), rtol=10 * ROUNDINGS, atol=10 * ROUNDINGS)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("decoupled", [True, False])
def test_a_coefficient_scales_the_gradient(name: str, decoupled: bool, seed: int) -> None:
    start = torch.randn(130, 256)
    ours, theirs = Trained(start.clone(), name), Trained(start.clone(), name)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "decoupled": decoupled}
    for step in (1, 2):
        grad = gradient((130, 256))
        adamw([ours], [grad], step, AdamWSettings(coefficient=0.25, **settings))  # type: ignore[arg-type]
        adamw([theirs], [grad * 0.25], step, AdamWSettings(**settings))  # type: ignore[arg-type]
    assert differing(ours, theirs) == []


# Layouts, dtypes and chunks


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed axes": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every second": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("name", ["4bit", "8bit", "paper4bit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout: str, name: str, seed: int) -> None:
    shape = (12, 300, 8, 10)  # more than one chunk
    plain = torch.randn(shape).bfloat16()
    grads = [gradient(shape, torch.bfloat16) for _ in range(2)]
    ours, theirs = Trained(LAYOUTS[layout](plain.clone()), name, "stochastic"), Trained(plain, name, "stochastic")
    assert not ours.param.is_contiguous()
    for step, grad in enumerate(grads, 1):
        adamw([ours], [LAYOUTS[layout](grad)], step, AdamWSettings(1e-2), stochastic=True)
        adamw([theirs], [grad], step, AdamWSettings(1e-2), stochastic=True)
    assert differing(ours, theirs) == []


@pytest.mark.parametrize("name", ["fp32", "4bit", "8bit", "fp8", "paper4bit"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_of_chunks_changes_nothing(
    shape: tuple[int, ...], name: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    start, grads = torch.randn(shape), [gradient(shape) for _ in range(3)]
    results = []
    for size in (CPU_CHUNK_ELEMENTS, 1280):
        monkeypatch.setattr(reference, "CPU_CHUNK_ELEMENTS", size)
        results.append(Trained(start.clone(), name))
        for step, grad in enumerate(grads, 1):
            adamw(results[-1:], [grad], step, AdamWSettings(1e-2), stochastic=True)
    assert differing(*results) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_16_bit_parameter_is_the_rounded_fp32_one(name: str, dtype: torch.dtype, seed: int) -> None:
    ours = Trained(torch.randn(130, 256).to(dtype), name)
    exact = Trained(ours.param.float(), name)
    grad = gradient((130, 256), dtype)
    adamw([ours], [grad], 1, AdamWSettings(1e-2, weight_decay=0.1))
    adamw([exact], [grad.float()], 1, AdamWSettings(1e-2, weight_decay=0.1))
    exact.param = exact.param.to(dtype)
    assert differing(ours, exact) == []


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
@pytest.mark.parametrize("name", FORMATS)
def test_no_axis_and_no_element_are_shapes_too(name: str, shape: tuple[int, ...]) -> None:
    ours = Trained(torch.ones(shape), name)
    adamw([ours], [torch.ones(shape)], 1, AdamWSettings(0.5))
    torch.testing.assert_close(ours.param, torch.full(shape, 0.5))


@pytest.mark.parametrize("name", ["4bit", "8bit", "fp8", "paper4bit", "factored"])
@pytest.mark.parametrize("chunk_elements", [CPU_CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS])
def test_temporaries_stay_below_64_mib(name: str, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CPU_CHUNK_ELEMENTS", chunk_elements)
    for shape in ((66, 2**16),) if chunk_elements == DEVICE_CHUNK_ELEMENTS else ((2050, 2050), (2**22 + 5,)):
        ours, grad = Trained(torch.zeros(shape), name), torch.ones(shape[::-1]).permute(*reversed(range(len(shape))))
        with PeakBytes() as peak:
            adamw([ours], [grad], 1, AdamWSettings(1e-3))
        assert 0 < peak.peak < 64 * MIB
        assert peak.live < MIB  # the tables stay, nothing else does


def test_peak_counts_what_is_alive_together() -> None:
    with PeakBytes() as peak:
        kept = torch.zeros(MIB)
        for _ in range(3):
            kept + 1  # freed at once
    assert peak.peak == 8 * MIB
    assert len(peak.operations) == 4


# Gradients of any size


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(256, 384), (5003,)])
def test_tiny_gradients_give_the_updates_of_large_ones(shape: tuple[int, ...], name: str, seed: int) -> None:
    """Adam does not see the gradient's scale, and a power of two is exact everywhere; 2^-27 is 7e-9."""
    large, small = Trained(torch.zeros(shape), name), Trained(torch.zeros(shape), name)
    settings = AdamWSettings(1e-2, eps=0.0)
    for step in range(1, 6):
        grad = gradient(shape) + 1e-6
        adamw([large], [grad], step, settings, stochastic=True)
        adamw([small], [grad * 2.0**-27], step, settings, stochastic=True)
    assert large.param.count_nonzero() == large.param.numel()
    assert torch.equal(large.param, small.param)


@pytest.mark.parametrize("least", [1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("name", ["4bit", "8bit", "fp8"])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_small_gradients_in_one_row_or_column_leave_the_others_alone(
    name: str, axis: str, least: float, seed: int
) -> None:
    """From the first step on, and when they become as large as the others: nobody's second moment runs away."""
    shape, index = (128, 256), (3, slice(None)) if axis == "row" else (slice(None), 7)
    others = torch.ones(shape, dtype=torch.bool)
    others[index] = False
    coarse, exact = Trained(torch.zeros(shape), name), Trained(torch.zeros(shape), "fp32")
    for step in range(1, 13):
        grad = torch.randn(shape)
        grad[index] *= least if step <= 6 else 1.0
        before = coarse.param.clone(), exact.param.clone()
        for each in (coarse, exact):
            adamw([each], [grad], step, AdamWSettings(1e-2), stochastic=True)
        moved, right = ((now.param - old).abs() for now, old in zip((coarse, exact), before, strict=True))
        for columns in (slice(0, 128), slice(128, 256)):
            ratio = float(moved[:, columns][others[:, columns]].mean() / right[:, columns][others[:, columns]].mean())
            assert 0.5 < ratio < 2, f"step {step}: the others move {ratio:.3g} times as far as in fp32"


@pytest.mark.parametrize("kind", NONFINITE)
@pytest.mark.parametrize("name", [*COMPILED, "paper4bit"])
@pytest.mark.parametrize("shape", [(256, 384), (5003,), (20, 20)])
def test_nan_or_inf_in_a_gradient_shows_in_the_parameter(
    shape: tuple[int, ...], name: str, kind: str, seed: int
) -> None:
    ours = Trained(torch.randn(shape), name)
    grad = torch.randn(shape)
    grad.view(-1)[57] = from_bits(NONFINITE[kind])
    others = torch.arange(grad.numel()) >= 128
    for step in (1, 2):
        adamw([ours], [grad], step, AdamWSettings(1e-3))
        assert bool(ours.param.view(-1)[57].isnan())
        assert not any(bool(decode(moment).view(-1)[57].isfinite()) for moment in ours.moments)
        if name != "paper4bit":  # a row and a column of whose rank-1 scales are gone
            assert bool(ours.param.view(-1)[others].isfinite().all())
            assert all(bool(decode(moment).view(-1)[others].isfinite().all()) for moment in ours.moments)
