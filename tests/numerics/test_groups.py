"""Grouped codes: bytes and errors are what the formats say, and the compiled kernels have the reference's bits."""

import math
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from packlight.numerics import compiler, group_operators, groups, groups_cpu
from packlight.numerics.groups import DTYPES, GROUP_FORMATS, MASK_DTYPES, SMALLEST_SCALE, GroupFormat, worst_error
from tests.numerics.cases import same, threads

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*two pools of threads compete"),
    pytest.mark.filterwarnings(
        "ignore:packlight's CPU kernels could not be compiled"
    ),  # the reference has the same bits
]
try:
    compiler.find_compiler()
    HAS_COMPILER = True
except compiler.CompilerMissing:
    HAS_COMPILER = False
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")

SIZES = (0, 1, 15, 16, 17, 4099, 100003)
OPERATORS = torch.ops.packlight
by_format = pytest.mark.parametrize("name", GROUP_FORMATS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda each: str(each).removeprefix("torch."))


def ordinary(numel: int, dtype: torch.dtype) -> Tensor:
    """Numbers of very different sizes, some of them zero."""
    drawn = torch.randn(numel) * 10 ** (8 * torch.rand(numel) - 4) * (torch.rand(numel) > 0.1)
    return drawn.clamp(-6e4, 6e4).to(dtype)


def of_any_bits(numel: int, dtype: torch.dtype) -> Tensor:
    """Every kind of NaN, infinity and subnormal number among all others; one group in two has none of them."""
    bits = torch.randint(-(2**31), 2**31, (numel,)).to(torch.int32)
    whole = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
    calm = (torch.arange(numel) // 128) % 2 == 0
    return torch.where(calm, ordinary(numel, dtype), whole)


def subnormal(numel: int, dtype: torch.dtype) -> Tensor:
    """Numbers around the dtype's smallest, and around the smallest scale."""
    size = torch.finfo(dtype).tiny if dtype == torch.float16 else torch.tensor([1e-45, 1e-38, SMALLEST_SCALE])
    sizes = torch.as_tensor(size).view(-1)
    return (torch.randn(numel) * 4 * sizes[torch.randint(len(sizes), (numel,))]).to(dtype)


def huge(numel: int, dtype: torch.dtype) -> Tensor:
    """Numbers up to the dtype's largest, which is among them."""
    flat = ((torch.rand(numel) * 2 - 1) * torch.finfo(dtype).max).to(dtype)
    flat[::7] = torch.finfo(dtype).max
    return flat


def masked(numel: int, dtype: torch.dtype) -> Tensor:
    """Numbers with infinities of either sign and NaNs in some groups, and in one of two nothing else."""
    flat = ordinary(numel, dtype)
    for bad in (math.inf, -math.inf, math.nan):
        flat[torch.rand(numel) < 0.01] = bad
    flat[: numel // 2] = -math.inf
    flat[-1:] = -0.0
    return flat


INPUTS: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "ordinary": ordinary,
    "any bits": of_any_bits,
    "subnormal": subnormal,
    "huge": huge,
    "masked": masked,
    "zeros": lambda numel, dtype: torch.zeros(numel, dtype=dtype),
}


def assert_gives_the_references_bits(
    kernels: Any, fmt: GroupFormat, flat: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    """Compare codes, scales, and what they decode to, signs of zeros included; `flat` is on the CPU."""
    expected = groups.encode(flat, fmt)
    found = kernels.encode(flat, fmt)
    assert all(map(equal_bits, found, expected)), (fmt.name, flat.dtype, flat.numel())
    for dtype in dtypes:
        decoded = kernels.decode(*found, fmt, flat.numel(), dtype)
        assert equal_bits(decoded, groups.decode(*expected, fmt, flat.numel(), dtype)), (fmt.name, flat.dtype, dtype)


def assert_gives_the_references_mask(kernels: Any, flat: Tensor) -> None:
    expected = groups.encode_mask(flat)
    assert torch.equal(kernels.encode_mask(flat), expected)
    for dtype in MASK_DTYPES:
        for value in (1.0, 1 / 0.9):
            decoded = kernels.decode_mask(expected, flat.numel(), dtype, value)
            assert equal_bits(decoded, groups.decode_mask(expected, flat.numel(), dtype, value))


def equal_bits(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors have the same numbers, zeros of the same sign, and NaNs in the same places."""
    return found.dtype == wanted.dtype and same(found, wanted) and bool(_signs(found).eq(_signs(wanted)).all())


def _signs(tensor: Tensor) -> Tensor:
    return tensor.signbit() & ~tensor.isnan()


# Formats


@by_format
@pytest.mark.parametrize("numel", [*SIZES, 31, 32, 33, 127, 128, 129])
def test_the_byte_formula_is_the_bytes(name: str, numel: int) -> None:
    fmt = GROUP_FORMATS[name]
    codes, scales = groups_cpu.encode(torch.ones(numel), fmt)
    assert codes.dtype == torch.uint8
    assert codes.untyped_storage().nbytes() + scales.untyped_storage().nbytes() == fmt.num_bytes(numel)
    assert groups_cpu.encode_mask(torch.ones(numel)).untyped_storage().nbytes() == groups.num_mask_bytes(numel)


def test_the_formats_have_the_bytes_that_their_names_promise() -> None:
    numel = 2**16
    found = {name: fmt.num_bytes(numel) for name, fmt in GROUP_FORMATS.items()}
    quarters = numel // 64
    assert found == {
        "fp8": 72 * quarters,
        "fp8_tensor": 64 * quarters + 4,
        "int8": 65 * quarters,
        "int4": 36 * quarters,
    }


@by_format
@by_dtype
@pytest.mark.parametrize("kind", ["ordinary", "subnormal", "huge", "masked", "zeros"])
def test_no_element_is_further_off_than_the_format_says(name: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    fmt, numel = GROUP_FORMATS[name], 4099
    flat = INPUTS[kind](numel, dtype)
    codes, scales = groups.encode(flat, fmt)
    decoded, exact = groups.decode(codes, scales, fmt, numel, dtype).double(), flat.double()
    scale = scales.double().abs().repeat_interleave(fmt.group_elements or numel)[:numel]
    bound, limits = worst_error(fmt), torch.finfo(dtype)
    error = torch.maximum(bound.relative * exact.abs(), bound.steps * scale) + 2**-22 * exact.abs()
    rounding = torch.clamp(limits.eps / 2 * (exact.abs() + error), min=limits.tiny * limits.eps / 2)
    is_finite = exact.isfinite()
    assert bool(((decoded - exact).abs() <= error + rounding)[is_finite].all())
    assert bool(decoded[is_finite].isfinite().all())


@by_format
def test_the_bound_is_reached(name: str, seed: int) -> None:
    fmt = GROUP_FORMATS[name]
    flat = torch.rand(10000)
    codes, scales = groups.encode(flat, fmt)
    error = (groups.decode(codes, scales, fmt, 10000, torch.float32) - flat).abs()
    bound, scale = worst_error(fmt), scales.float().repeat_interleave(fmt.group_elements or 10000)[:10000]
    assert float((error / torch.maximum(bound.relative * flat, bound.steps * scale)).max()) > 0.9


@by_format
def test_a_scale_is_just_large_enough(name: str, seed: int) -> None:
    fmt = GROUP_FORMATS[name]
    width = fmt.group_elements or 1024
    flat = ordinary(1024, torch.float32)
    exact = flat.view(-1, width).abs().amax(1).double() / fmt.largest
    scales = groups.encode(flat, fmt)[1].double()
    assert bool((scales >= exact.clamp(min=SMALLEST_SCALE) * (1 - 2**-23)).all())
    assert bool((scales <= exact.clamp(min=SMALLEST_SCALE) * (1 + 2**-7)).all())


@by_format
@by_dtype
@pytest.mark.parametrize("kind", INPUTS)
def test_nothing_but_zero_becomes_zero_and_no_sign_changes(name: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    fmt, numel = GROUP_FORMATS[name], 4099
    flat = INPUTS[kind](numel, dtype)
    decoded = groups.decode(*groups.encode(flat, fmt), fmt, numel, dtype)
    flat, decoded = (each[~flat.isnan()].double() for each in (flat, decoded))  # an fp32 subnormal may be flushed
    assert torch.equal(decoded.sign(), flat.sign())


@by_format
@by_dtype
def test_infinities_and_nans_come_back_and_spread_to_no_other_element(name: str, dtype: torch.dtype, seed: int) -> None:
    fmt, flat = GROUP_FORMATS[name], masked(4099, dtype)
    decoded = groups_cpu.decode(*groups_cpu.encode(flat, fmt), fmt, 4099, dtype)
    assert same(torch.where(decoded.isfinite(), 0, decoded), torch.where(flat.isfinite(), 0, flat))


@by_format
def test_an_infinity_costs_its_group_one_step_of_an_integer_s_range_and_other_groups_nothing(
    name: str, seed: int
) -> None:
    fmt, flat = GROUP_FORMATS[name], ordinary(1024, torch.float32)
    scales = groups.encode(flat, fmt)[1].float()
    flat[flat.abs().argmin()] = math.inf
    beside = groups.encode(flat, fmt)[1].float()
    is_marked = beside < 0
    assert int(is_marked.sum()) == 1
    assert torch.equal(beside[~is_marked], scales[~is_marked])
    assert float(-beside[is_marked]) <= float(scales[is_marked]) * fmt.largest / fmt.largest_of_marked * (1 + 2**-7)


@by_format
@by_dtype
def test_the_largest_number_does_not_become_infinite(name: str, dtype: torch.dtype, seed: int) -> None:
    fmt = GROUP_FORMATS[name]
    flat = huge(1000, dtype)
    assert bool(groups_cpu.decode(*groups_cpu.encode(flat, fmt), fmt, 1000, dtype).isfinite().all())


@by_format
def test_flushing_subnormal_numbers_changes_nothing(name: str, seed: int) -> None:
    fmt, flat = GROUP_FORMATS[name], subnormal(5000, torch.float32)
    expected = groups.encode(flat, fmt)
    decoded = groups.decode(*expected, fmt, 5000, torch.bfloat16)
    if not torch.set_flush_denormal(True):
        pytest.skip("the processor cannot")
    try:
        found = [groups_cpu.encode(flat, fmt), groups.encode(flat, fmt)]
        again = [each.decode(*expected, fmt, 5000, torch.bfloat16) for each in (groups_cpu, groups)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, expected, strict=True))
    assert all(torch.equal(each, decoded) for each in again)


def test_a_nibble_is_half_a_group_away_from_its_other(seed: int) -> None:
    fmt = GROUP_FORMATS["int4"]
    flat = torch.randint(-6, 7, (32 + 9,)).float()
    flat[0] = flat[32] = 6
    codes, scales = groups_cpu.encode(flat, fmt)
    assert scales.tolist() == [1, 1]
    low, high = ((codes & 15) ^ 8).float() - 8, ((codes >> 4) ^ 8).float() - 8
    assert torch.equal(low, torch.cat((flat[:16], flat[32:])))
    assert torch.equal(high[:16], flat[16:32])


# Masks


@pytest.mark.parametrize("numel", SIZES)
def test_a_boolean_tensor_comes_back(numel: int, seed: int) -> None:
    flat = torch.rand(numel) < 0.3
    assert torch.equal(groups_cpu.decode_mask(groups_cpu.encode_mask(flat), numel, torch.bool), flat)


@by_dtype
def test_a_dropout_mask_comes_back_with_its_value(dtype: torch.dtype, seed: int) -> None:
    flat = ((torch.rand(4099) < 0.9).float() / 0.9).to(dtype)
    assert torch.equal(groups_cpu.decode_mask(groups_cpu.encode_mask(flat), 4099, dtype, 1 / 0.9), flat)


@by_dtype
def test_a_mask_is_what_the_backward_of_relu_lets_through(dtype: torch.dtype, seed: int) -> None:
    flat = torch.cat((of_any_bits(4099, dtype), subnormal(999, dtype), torch.tensor([0.0, -0.0], dtype=dtype)))
    result = flat.clone().requires_grad_()
    (expected,) = torch.autograd.grad(result.relu(), result, torch.ones_like(result))
    found = groups_cpu.decode_mask(groups_cpu.encode_mask(flat), flat.numel(), dtype)
    assert torch.equal(found, expected)


# The compiled kernels


@needs_compiler
@by_format
@by_dtype
@pytest.mark.parametrize("kind", INPUTS)
def test_the_compiled_codes_are_the_references_bit_for_bit(name: str, dtype: torch.dtype, kind: str, seed: int) -> None:
    assert groups_cpu.compiled() is not None
    for numel in SIZES:
        assert_gives_the_references_bits(groups_cpu, GROUP_FORMATS[name], INPUTS[kind](numel, dtype))


@needs_compiler
@by_dtype
@pytest.mark.parametrize("numel", SIZES)
def test_the_compiled_masks_are_the_references(dtype: torch.dtype, numel: int, seed: int) -> None:
    flat = of_any_bits(numel, dtype)
    assert_gives_the_references_mask(groups_cpu, flat)
    assert_gives_the_references_mask(groups_cpu, flat > 0)


@needs_compiler
@by_format
def test_any_number_of_threads_and_any_address_give_the_same_bits(name: str, seed: int) -> None:
    flat = ordinary(2 * groups_cpu.SERIAL_ELEMENTS + 77, torch.bfloat16)[3:]
    for number in (1, 3):
        with threads(number):
            assert_gives_the_references_bits(groups_cpu, GROUP_FORMATS[name], flat)
            assert_gives_the_references_mask(groups_cpu, flat)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize(
    "flags", [pytest.param("-mno-avx512f", marks=pytest.mark.slow), "-mno-avx512f -mno-avx -mno-f16c"]
)
def test_processors_with_narrower_vectors_give_the_same_bits(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    command = " ".join(compiler.find_compiler()[0])
    monkeypatch.setenv("CXX", f"{command} {flags}")
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_loaded", {})
    groups_cpu.compiled.cache_clear()
    try:
        assert groups_cpu.compiled() is not None
        for dtype in DTYPES:
            for draw in INPUTS.values():
                flat = draw(4099, dtype)
                for fmt in GROUP_FORMATS.values():
                    assert_gives_the_references_bits(groups_cpu, fmt, flat)
                assert_gives_the_references_mask(groups_cpu, flat)
                assert_gives_the_references_mask(groups_cpu, flat > 0)
    finally:
        groups_cpu.compiled.cache_clear()


def test_without_a_compiler_the_reference_encodes_and_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_loaded", {})
    groups_cpu.compiled.cache_clear()
    flat = ordinary(4099, torch.float32)
    try:
        with pytest.warns(UserWarning, match="activations are compressed in plain PyTorch.*set CXX to one"):
            groups_cpu.encode_mask(flat)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_gives_the_references_bits(groups_cpu, GROUP_FORMATS["fp8"], flat)
            assert_gives_the_references_mask(groups_cpu, flat)
    finally:
        groups_cpu.compiled.cache_clear()


# The operators


@by_format
@by_dtype
def test_schema_and_fake_of_the_codes_are_what_torch_wants(name: str, dtype: torch.dtype, seed: int) -> None:
    for numel in (0, 17, 4099):
        flat = ordinary(numel, dtype)
        codes, scales = groups.encode(flat, GROUP_FORMATS[name])
        encoded = torch.library.opcheck(OPERATORS.group_encode.default, (flat, name))
        decoded = torch.library.opcheck(OPERATORS.group_decode.default, (codes, scales, name, numel, dtype))
        assert {*encoded.values(), *decoded.values()} == {"SUCCESS"}


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=lambda each: str(each).removeprefix("torch."))
def test_schema_and_fake_of_the_masks_are_what_torch_wants(dtype: torch.dtype, seed: int) -> None:
    for numel in (0, 17, 4099):
        flat = ordinary(numel, torch.float32).to(dtype)
        encoded = torch.library.opcheck(OPERATORS.mask_encode.default, (flat,))
        decoded = torch.library.opcheck(
            OPERATORS.mask_decode.default, (groups.encode_mask(flat), numel, dtype, 1 / 0.9)
        )
        assert {*encoded.values(), *decoded.values()} == {"SUCCESS"}


@pytest.mark.parametrize("name", [*GROUP_FORMATS, group_operators.MASK])
@by_dtype
def test_the_entry_points_give_what_the_operators_give(name: str, dtype: torch.dtype, seed: int) -> None:
    flat = ordinary(4099, dtype)
    tensors = group_operators.encode(flat, name)
    with Seen() as seen:
        again = group_operators.encode(flat, name)
        decoded = group_operators.decode(again, name, 4099, dtype)
    assert seen.names == (["mask_encode", "mask_decode"] if name == "mask" else ["group_encode", "group_decode"])
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
    assert torch.equal(group_operators.decode(tensors, name, 4099, dtype), decoded)


class Seen(TorchDispatchMode):
    """The names of packlight's operators that were called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "packlight":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*GROUP_FORMATS, group_operators.MASK])
def test_fake_tensors_go_through(name: str) -> None:
    real = group_operators.encode(torch.ones(4099), name)
    with FakeTensorMode():
        tensors = group_operators.encode(torch.ones(4099), name)
        decoded = group_operators.decode(tensors, name, 4099, torch.bfloat16)
    assert all(isinstance(each, FakeTensor) for each in (*tensors, decoded))
    assert [(each.shape, each.dtype) for each in tensors] == [(each.shape, each.dtype) for each in real]
    assert decoded.dtype == torch.bfloat16 and decoded.shape == (4099,)


@pytest.mark.parametrize("name", [*GROUP_FORMATS, group_operators.MASK])
def test_hooks_that_call_them_save_nothing_and_gradients_flow(name: str, seed: int) -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Any:
        tensors = group_operators.encode(tensor.reshape(-1), name)
        kept.extend(tensors)
        return tensors, tensor.shape, tensor.dtype

    def unpack(packed: Any) -> Tensor:
        tensors, shape, dtype = packed
        return group_operators.decode(tensors, name, shape.numel(), dtype).view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = (weight @ weight).sum()
    loss.backward()
    assert kept and not any(each.requires_grad or each.grad_fn for each in kept)
    stored = group_operators.decode(group_operators.encode(weight.detach().view(-1), name), name, 4096, weight.dtype)
    ones, seen = torch.ones(64, 64), stored.view(64, 64)
    torch.testing.assert_close(weight.grad, ones @ seen.t() + seen.t() @ ones)


@pytest.mark.parametrize("name", [*GROUP_FORMATS, group_operators.MASK])
def test_torch_compile_keeps_the_operators_whole(name: str, seed: int) -> None:
    def there_and_back(flat: Tensor) -> Tensor:
        return group_operators.decode(group_operators.encode(flat * 2, name), name, flat.numel(), flat.dtype) + 1

    flat = ordinary(4099, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(flat)
    torch._dynamo.reset()
    assert torch.equal(compiled, there_and_back(flat))


def test_what_has_no_codes_is_refused_with_what_was_wanted() -> None:
    flat = torch.ones(64)
    codes, scales = group_operators.encode(flat, "int8")
    with pytest.raises(ValueError, match="no format of saved tensors is called 'int3'; there are fp8"):
        group_operators.encode(flat, "int3")
    with pytest.raises(ValueError, match=r"numbers of torch.float64 have no codes; those of torch.float32"):
        group_operators.encode(flat.double(), "int8")
    with pytest.raises(ValueError, match=r"a tensor to be encoded: got torch.float32, \(8, 8\)"):
        group_operators.encode(flat.view(8, 8), "mask")
    with pytest.raises(ValueError, match=r"strides \(2,\); wanted torch.float32, \(32,\), contiguous"):
        group_operators.encode(flat[::2], "fp8")
    with pytest.raises(ValueError, match=r"int8 codes of 65 elements: got torch.uint8, \(64,\)"):
        group_operators.decode((codes, scales), "int8", 65, torch.float32)
    with pytest.raises(ValueError, match=r"fp8 scales of 64 elements: .* wanted torch.bfloat16, \(4,\)"):
        group_operators.decode((codes, scales), "fp8", 64, torch.float32)
    with pytest.raises(ValueError, match=r"a mask of 600 elements: .* wanted torch.uint8, \(75,\)"):
        group_operators.decode_mask(codes, 600, torch.float32)
