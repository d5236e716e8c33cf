"""A state's bytes are what the formula says, and its portable form is what torch.optim.AdamW holds."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packlight.numerics import FORMATS, AdamWSettings
from packlight.optim.state import (
    MOMENTUM,
    from_portable,
    init_state,
    nbytes,
    state_bytes,
    stored_moments,
    to_portable,
)
from packlight.optim.stepping import update

SHAPES = [(), (0,), (4096,), (4097,), (769, 1003), (4, 5, 6, 997), (50257, 4), (100_003,), (2, 300_000), (0, 7)]
ROUNDINGS = ["stochastic", "nearest", "master24", "master32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula_is_the_real_bytes(shape: tuple[int, ...], state_format: str, dtype: torch.dtype) -> None:
    state = init_state(torch.zeros(shape, dtype=dtype), state_format)
    assert state_bytes(shape, dtype, state_format) == nbytes(state)
    assert nbytes(state) == sum(tensor.untyped_storage().nbytes() for tensor in state.values())


@given(
    shape=st.lists(st.integers(1, 200), min_size=1, max_size=3).filter(lambda shape: math.prod(shape) < 2**18),
    state_format=st.sampled_from(sorted(FORMATS)),
    rounding=st.sampled_from(ROUNDINGS),
    moments=st.sampled_from([("exp_avg", "exp_avg_sq"), MOMENTUM, ()]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_formula_holds_for_every_shape_rounding_and_kind_of_optimiser(
    shape: list[int], state_format: str, rounding: str, moments: tuple[str, ...], dtype: torch.dtype
) -> None:
    param = torch.zeros(shape, dtype=dtype)
    state = init_state(param, state_format, moments=moments, rounding=rounding)
    assert state_bytes(shape, dtype, state_format, moments=moments, rounding=rounding) == nbytes(state)


@pytest.mark.parametrize(
    ("shape", "state_format", "expected"),
    [
        ((1024,), "4bit", 4 + 2 * 4 * 1024),
        ((1024, 768), "fp32", 4 + 8 * 1024 * 768),
        # 129129 elements: 1008 blocks of 64 bytes and one of 105 elements; 1130 rows and columns, two steps of each
        ((1001, 129), "4bit", 4 + 2 * (1008 * 64 + 64 + 4 * 1009) + 8 * 1130),
        ((1001, 129), "paper4bit", 4 + 2 * (1008 * 64 + 64) + 4 * 1009 + 4 * 1130),
        ((1001, 129), "factored", 4 + 1008 * 64 + 64 + 4 * 1009 + 4 * 1130),
        ((1001, 129), "8bit", 4 + 2 * (129129 + 2 * 4036)),
        ((1001, 129), "fp8", 4 + 2 * (129129 + 5 * 1009)),
        ((5001,), "4bit", 4 + 2 * (39 * 64 + 9 + 4 * 40)),  # the last block has 9 elements, a byte each
        ((5001,), "paper4bit", 4 + 2 * (39 * 64 + 9 + 4 * 40)),
    ],
)
def test_formula_by_hand(shape: tuple[int, ...], state_format: str, expected: int) -> None:
    assert state_bytes(shape, torch.bfloat16, state_format) == expected


@pytest.mark.parametrize(("rounding", "bytes_per_element"), [*zip(ROUNDINGS, (0, 0, 1, 2), strict=True)])
def test_error_bits_count_beside_bf16_parameters_only(rounding: str, bytes_per_element: int) -> None:
    plain = state_bytes((100, 70), torch.bfloat16, "4bit")
    assert state_bytes((100, 70), torch.bfloat16, "4bit", rounding=rounding) == plain + 7000 * bytes_per_element
    assert state_bytes((100, 70), torch.float32, "4bit", rounding=rounding) == plain


def test_keys_and_dtypes_are_plain() -> None:
    state = init_state(torch.zeros(70, 80, 3, dtype=torch.bfloat16), "4bit", rounding="master24")
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "step": (torch.float32, ()),
        "exp_avg_codes": (torch.uint8, (8416,)),
        "exp_avg_scale": (torch.float32, (132,)),
        "exp_avg_sq_codes": (torch.uint8, (8416,)),
        "exp_avg_sq_scale": (torch.float32, (132,)),
        "param_error": (torch.int8, (16800,)),
    }
    state = init_state(torch.zeros(200, 150), "4bit")
    assert (state["exp_avg_sq_rows"].shape, state["exp_avg_sq_cols"].shape) == ((2, 200), (2, 150))
    assert init_state(torch.zeros(5000), "8bit")["exp_avg_scale"].dtype == torch.bfloat16
    assert set(init_state(torch.zeros(5), "4bit")) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(init_state(torch.zeros(5000), "4bit", moments=MOMENTUM)) == {
        *("step", "momentum_buffer_codes", "momentum_buffer_scale")
    }


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("shape", [(100, 150), (9001,), (30,)], ids=str)
def test_new_state_decodes_to_zeros(shape: tuple[int, ...], state_format: str) -> None:
    state = init_state(torch.ones(shape), state_format)
    for value in to_portable(state, shape=shape, state_format=state_format).values():
        assert not value.any()


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("shape", [(100, 150), (9001,), (30,)], ids=str)
def test_portable_form_is_torchs_and_encodes_again(shape: tuple[int, ...], state_format: str, seed: int) -> None:
    param = torch.randn(shape)
    state = init_state(param, state_format)
    update(param, torch.randn(shape), state, state_format=state_format, settings=AdamWSettings(1e-3))
    portable = to_portable(state, shape=shape, state_format=state_format)
    assert [*portable] == ["step", "exp_avg", "exp_avg_sq"]
    assert {(key, value.dtype) for key, value in portable.items()} == {(key, torch.float32) for key in portable}
    assert float(portable["step"]) == 1
    again = from_portable(portable, state_format=state_format)
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in state.items()}
    assert float(again["step"]) == 1


@pytest.mark.parametrize("state_format", ["fp32", "8bit", "4bit"])
def test_decoded_first_moment_encodes_to_itself(state_format: str, seed: int) -> None:
    values = torch.randn(9001)
    portable = {"step": torch.tensor(3.0), "exp_avg": values, "exp_avg_sq": values.square()}
    once, shape = from_portable(portable, state_format=state_format), (9001,)
    decoded = to_portable(once, shape=shape, state_format=state_format)
    twice = to_portable(from_portable(decoded, state_format=state_format), shape=shape, state_format=state_format)
    # The scale is rounded once more at most: 8bit's to bf16, the others' by a product.
    assert torch.allclose(twice["exp_avg"], decoded["exp_avg"], rtol=2.0**-7 if state_format == "8bit" else 2.0**-22)


def test_portable_form_shares_nothing_with_the_state(seed: int) -> None:
    state = init_state(torch.zeros(30), "4bit")
    portable = to_portable(state, shape=(30,), state_format="4bit")
    again = from_portable(portable, state_format="4bit")
    pointers = [value.data_ptr() for each in (state, portable, again) for value in each.values()]
    assert len(set(pointers)) == len(pointers)


def test_state_loads_with_weights_only() -> None:
    buffer = io.BytesIO()
    torch.save(init_state(torch.zeros(200, 150), "4bit"), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["exp_avg_codes"].dtype == torch.uint8


@pytest.mark.parametrize(
    "keys",
    [("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ("step", "exp_avg"), ("momentum_buffer",), ()],
    ids=str,
)
def test_state_of_another_optimiser_or_amsgrad_is_refused(keys: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="without amsgrad"):
        from_portable(dict.fromkeys(keys, torch.zeros(3)), state_format="4bit")


def test_state_of_another_format_is_named() -> None:
    with pytest.raises(ValueError, match="exp_avg_codes"):
        stored_moments(init_state(torch.zeros(100, 70), "fp32"), (100, 70), "4bit")
    with pytest.raises(ValueError, match="int8"):
        stored_moments(init_state(torch.zeros(100, 70), "fp8"), (100, 70), "8bit")


def test_state_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(100, 70\)"):
        stored_moments(init_state(torch.zeros(100, 71), "4bit"), (100, 70), "4bit")


def test_sparse_gradient_is_refused() -> None:
    param = torch.zeros(100, 70)
    state = init_state(param, "fp32")
    with pytest.raises(ValueError, match="sparse=False"):
        update(param, param.to_sparse(), state, state_format="fp32", settings=AdamWSettings(1e-3))
    assert float(state["step"]) == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int64, torch.float8_e4m3fn])
def test_dtype_that_the_formats_do_not_take_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW"):
        state_bytes((5,), dtype, "fp32")
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW"):
        init_state(torch.zeros(5).to(dtype), "fp32")
