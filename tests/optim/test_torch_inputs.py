"""packlight's optimisers take what PyTorch's own tests give torch.optim's, and do the same with it."""

import importlib
import importlib.util
import inspect
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import packlight
from packlight.optim.state import nbytes

KINDS: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer]]] = {
    "AdamW": (torch.optim.AdamW, packlight.AdamW),
    "Adam": (torch.optim.Adam, packlight.Adam),
    "SGD": (torch.optim.SGD, packlight.SGD),
}

# What PyTorch's inputs have and ours leave out, with the reason.
SKIPPED = {
    "amsgrad": "its third moment only ever grows; it is refused",
    "capturable": "torch refuses it on the CPU",
    "differentiable": "states in few bits have no derivative; it is refused",
}
# What torch refuses of these it refuses of its own implementations; ours is another, and they have no effect.
WITHOUT_EFFECT = {"foreach", "fused", "capturable"}
SKIPPED_ERRORS = {"betas must be either both floats or both Tensors": "tensors are read as floats, each by itself"}

# The update of ten steps on random gradients against torch's, root mean square over root mean square.
# Rounding a first moment changes it by .09 of its root mean square (NF4, blocks of 128 normal numbers), by .01 at
# most (8bit: half of 1/127, of the block's largest) or .04 (fp8: an E4M3 number, 2^-4 / sqrt(3)). With beta1 .9
# ten such errors add up to sqrt(sum .81^k) = 2 times that. A second moment's root at .25 to .5 of its block's
# largest is off by a quarter of 1/16, 1/256 or a 2^-4 of itself: 6 to 12 %, .8 % and 2 %.
# The published map of first moments is coarser (.165), which adds up to .33. factored knows row and column means of ten
# squares only: for random gradients each element's sum differs from them by sqrt(2 / 10), its root by half of that.
UPDATE_ERROR = {"4bit": 0.4, "8bit": 0.05, "fp8": 0.12, "paper4bit": 0.4, "factored": 0.45}
# These store vectors of more than 4096 elements in few bits, too.
PUBLISHED = {"paper4bit", "factored"}

SHAPES = [(70, 150), (5001,), (3, 4), (), (6, 40, 5, 5)]
NUM_STEPS = 10


def _optim_db() -> dict[str, Any]:
    """Import PyTorch's table of optimisers, with a stand-in for a base class of its tests if that is not here."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("expecttest") is None:
            stand_in = types.ModuleType("expecttest")
            stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "expecttest", stand_in)
        module = importlib.import_module("torch.testing._internal.common_optimizers")
    return {info.optim_cls.__name__: info for info in module.optim_db if info.optim_cls.__name__ in KINDS}


DATABASE = _optim_db()


def _inputs() -> Iterator[Any]:
    for kind, info in DATABASE.items():
        for one in info.optim_inputs_func(device="cpu"):
            if not SKIPPED.keys() & one.kwargs:
                yield pytest.param(kind, one.kwargs, id=f"{kind}: {one.desc}")


def _error_inputs() -> Iterator[Any]:
    for kind, info in DATABASE.items():
        for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            one = error.optimizer_error_input
            if not (SKIPPED.keys() | WITHOUT_EFFECT) & one.kwargs.keys() and one.desc not in SKIPPED_ERRORS:
                yield pytest.param(kind, one.params, one.kwargs, error.error_type, id=f"{kind}: {one.desc}")


def trained(cls: Any, options: dict[str, Any], *, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the parameters after ten steps on random gradients; they start as small as their updates."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(1e-3 * torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = cls(params, **options)
    for _ in range(NUM_STEPS):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return [param.detach() for param in params]


def test_torchs_optimisers_are_all_here() -> None:
    assert DATABASE.keys() == KINDS.keys()
    assert len(list(_inputs())) >= 17
    assert len(list(_error_inputs())) >= 20


@pytest.mark.parametrize(("kind", "options"), [*_inputs()])
def test_fp32_format_is_torchs_step_but_for_rounding(kind: str, options: dict[str, Any], seed: int) -> None:
    theirs, ours = KINDS[kind]
    expected = trained(theirs, options, seed=seed)
    found = trained(ours, {**options, "state_format": "fp32"}, seed=seed)
    for a, b in zip(found, expected, strict=True):
        # A step is about eight operations, each rounded to 2^-24 of numbers as large as the largest update.
        bound = NUM_STEPS * 8 * 2.0**-24 * max(float(b.abs().max()), float(options.get("lr", 1e-3)))
        assert float((a - b).abs().max()) <= bound


@pytest.mark.parametrize("state_format", UPDATE_ERROR)
@pytest.mark.parametrize(("kind", "options"), [*_inputs()])
def test_low_bit_update_is_as_close_as_its_format_allows(
    kind: str, options: dict[str, Any], state_format: str, seed: int
) -> None:
    theirs, ours = KINDS[kind]
    by_name = {"state_format": state_format}
    start = trained(theirs, {**options, "lr": 0.0}, seed=seed)
    expected = trained(theirs, options, seed=seed)
    found = trained(ours, {**options, **by_name}, seed=seed)
    for a, b, c, shape in zip(found, expected, start, SHAPES, strict=True):
        error = float((a - b).norm() / (b - c).norm())
        print(f"{state_format} {shape}: {error:.3f}")
        low_bit = a.numel() > 4096 and (len(shape) > 1 or state_format in PUBLISHED)
        assert error <= (UPDATE_ERROR[state_format] if low_bit else 1e-5)


@pytest.mark.parametrize(
    "state_format", [name for name in UPDATE_ERROR if name != "factored"]
)  # that divides by its means at once
@pytest.mark.parametrize(("kind", "options"), [*_inputs()])
def test_first_step_knows_no_rounding(kind: str, options: dict[str, Any], state_format: str, seed: int) -> None:
    _, ours = KINDS[kind]
    found = []
    for name in (state_format, "fp32"):
        generator = torch.Generator().manual_seed(seed)
        param = torch.nn.Parameter(torch.randn(70, 150, generator=generator))
        param.grad = torch.randn(70, 150, generator=generator)
        optimizer: Any = ours([param], **options, state_format=name)  # type: ignore[call-arg]
        optimizer.step()
        found.append(param.detach())
        assert sum(map(nbytes, optimizer.state.values())) == optimizer.state_bytes()
    assert torch.equal(*found)


@pytest.mark.parametrize(("kind", "params", "options", "error"), [*_error_inputs()])
def test_what_torch_refuses_is_refused(
    kind: str, params: Any, options: dict[str, Any], error: type[Exception], seed: int
) -> None:
    theirs, ours = KINDS[kind]
    given = [torch.nn.Parameter(torch.randn(1, 1))] if params is None else params
    for cls in (theirs, ours):
        if issubclass(error, Warning):
            with pytest.warns(error):
                cls(given, **options)
        else:
            with pytest.raises(error):
                cls(given, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_torchs_is_taken_or_named_here(kind: str) -> None:
    theirs, ours = KINDS[kind]
    options = set(inspect.signature(theirs).parameters) - set(inspect.signature(ours).parameters)
    assert options <= {"decoupled_weight_decay"}  # Adam and AdamW are two classes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", sorted(WITHOUT_EFFECT))
def test_a_choice_among_torchs_implementations_has_no_effect(kind: str, option: str, seed: int) -> None:
    theirs, ours = KINDS[kind]
    if option in inspect.signature(theirs).parameters:
        for a, b in zip(trained(ours, {option: True}, seed=seed), trained(ours, {}, seed=seed), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_differentiable_step_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="differentiable"):
        KINDS[kind][1]([torch.zeros(3)], differentiable=True)  # type: ignore[call-arg]
