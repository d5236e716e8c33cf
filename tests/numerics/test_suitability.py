"""What the compiled step does not take goes another way, with the same bits, and is named once."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from packlight.numerics import AdamWSettings, SGDSettings, call, compiler, cpu, suitability
from tests.numerics.cases import COMPILED, PUBLISHED, Trained, adamw, differing, gradient, sgd

try:
    compiler.find_compiler()
    HAS_COMPILER = True
except compiler.CompilerMissing:
    HAS_COMPILER = False
pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
NUMBERS, PLAIN = AdamWSettings(1e-2, weight_decay=0.1), SGDSettings(0.1)


@pytest.fixture(autouse=True)
def warned_of_nothing() -> Iterator[None]:
    cpu._warn_slow.cache_clear()
    yield
    cpu._warn_slow.cache_clear()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_formats_are_named_once(name: str, seed: int) -> None:
    trained = Trained(torch.randn(130, 256), name)
    with pytest.warns(UserWarning, match="paper4bit and factored") as seen:
        for step in (1, 2):
            adamw([trained], [gradient((130, 256))], step, NUMBERS, engine="cpu")
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_of_plain_sgd_are_named(dtype: torch.dtype, seed: int) -> None:
    trained = Trained(torch.randn(5003).to(dtype), num_moments=0)
    with pytest.warns(UserWarning, match=f"parameters of {dtype}"):
        sgd([trained], [gradient((5003,), dtype)], 1, PLAIN, engine="cpu")


@pytest.mark.parametrize(
    ("dtype", "grad_dtype"), [(torch.float16, torch.float16), (torch.float32, torch.bfloat16)], ids=str
)
def test_dtypes_are_named(dtype: torch.dtype, grad_dtype: torch.dtype, seed: int) -> None:
    trained = Trained(torch.randn(100, 70).to(dtype))
    with pytest.warns(UserWarning, match=f"does not take .*{grad_dtype}"):
        adamw([trained], [gradient((100, 70), grad_dtype)], 1, NUMBERS, engine="cpu")


def test_fp32_parameters_of_plain_sgd_go_through_no_reference(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    ours, theirs = (Trained(torch.arange(12.0).view(3, 4), num_moments=0) for _ in range(2))
    sgd([theirs], [torch.ones(3, 4)], 1, PLAIN)
    monkeypatch.setattr(call, "reference", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd([ours], [torch.ones(3, 4)], 1, PLAIN, engine="cpu")
    assert differing(ours, theirs) == []


@pytest.mark.parametrize("case", ["channels_last", "transposed", "gradient only"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_parameter_that_lies_otherwise_is_copied_and_has_the_same_bits(
    name: str, case: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(call, "reference", None)
    start = torch.randn(40, 12, 5, 5)
    ours, theirs = Trained(start.clone(), name), Trained(start.clone(), name)

    def lay(x: Tensor) -> Tensor:
        if case == "transposed":
            return x.mT.contiguous().mT
        return x.contiguous(memory_format=torch.channels_last)

    if case != "gradient only":
        ours.param = lay(start)
        assert not ours.param.is_contiguous()
    strides = ours.param.stride()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2):
            grad = gradient(tuple(start.shape))
            adamw([ours], [lay(grad)], step, NUMBERS, engine="cpu", stochastic=True)
            adamw([theirs], [grad], step, NUMBERS, engine="cpu", stochastic=True)
            sgd_pair = Trained(lay(start), num_moments=0), Trained(start.clone(), num_moments=0)
            sgd([sgd_pair[0]], [lay(grad)], step, PLAIN, engine="cpu")
            sgd([sgd_pair[1]], [grad], step, PLAIN, engine="cpu")
            assert differing(*sgd_pair) == []
    assert differing(ours, theirs) == []
    assert ours.param.stride() == strides


def test_a_parameter_too_large_to_be_copied_is_named(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(suitability, "MAX_COPIED_ELEMENTS", 4999)
    param = torch.randn(50, 100).t()
    ours, theirs = Trained(param.clone(memory_format=torch.preserve_format)), Trained(param.clone())
    grad = gradient((100, 50))
    with pytest.warns(UserWarning, match="more than 4999 elements that.* not contiguous"):
        adamw([ours], [grad], 1, NUMBERS, engine="cpu")
    adamw([theirs], [grad], 1, NUMBERS)
    assert differing(ours, theirs) == []


def test_what_is_compiled_has_no_reason() -> None:
    slot = Trained(torch.zeros(100, 70)).slot(torch.zeros(100, 70), 1)
    assert suitability.suits(slot)
    assert suitability.slow_reason(slot) is None
