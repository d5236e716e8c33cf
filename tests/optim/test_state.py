"""A state's bytes are what the formula says, and its portable form is what torch.optim.AdamW holds."""

import io

import pytest
import torch

from packlight.numerics import AdamWSettings
from packlight.optim.state import (
    from_portable,
    init_state,
    nbytes,
    state_bytes,
    stored_moments,
    to_portable,
    update,
)

FORMATS = ["fp32", "paper4bit"]
SHAPES = [(), (0,), (4096,), (4097,), (769, 1003), (4, 5, 6, 997), (50257, 4), (100_003,), (2, 300_000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula_is_the_real_bytes(shape: tuple[int, ...], state_format: str, dtype: torch.dtype) -> None:
    state = init_state(torch.zeros(shape, dtype=dtype), state_format)
    assert state_bytes(shape, dtype, state_format) == nbytes(state)
    assert nbytes(state) == sum(tensor.untyped_storage().nbytes() for tensor in state.values())


def test_formula_by_hand() -> None:
    assert state_bytes((1024,), torch.bfloat16, "paper4bit") == 4 + 2 * 4 * 1024
    assert state_bytes((1024, 768), torch.float32, "fp32") == 4 + 8 * 1024 * 768
    assert state_bytes((1001, 129), torch.float32, "paper4bit") == (
        4 + 2 * 64565 + 4 * 1009 + 4 * (1001 + 129)  # step, two moments' codes, blocks of exp_avg, rows and columns
    )
    assert state_bytes((5001,), torch.float32, "paper4bit") == 4 + 2 * 2501 + 2 * 4 * 40


def test_keys_and_dtypes_are_plain() -> None:
    state = init_state(torch.zeros(70, 80, 3, dtype=torch.bfloat16), "paper4bit")
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "step": (torch.float32, ()),
        "exp_avg_codes": (torch.uint8, (8400,)),
        "exp_avg_scale": (torch.float32, (132,)),
        "exp_avg_sq_codes": (torch.uint8, (8400,)),
        "exp_avg_sq_scale_0": (torch.float32, (70,)),
        "exp_avg_sq_scale_1": (torch.float32, (80,)),
        "exp_avg_sq_scale_2": (torch.float32, (3,)),
    }
    assert set(init_state(torch.zeros(5000), "paper4bit")) == {
        *("step", "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale")
    }
    assert set(init_state(torch.zeros(5), "paper4bit")) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize("shape", [(100, 70), (9001,), (30,)], ids=str)
def test_decoding_and_encoding_again_changes_nothing_that_decodes(
    shape: tuple[int, ...], state_format: str, seed: int
) -> None:
    param = torch.randn(shape)
    state = init_state(param, state_format)
    update(param, torch.randn(shape), state, state_format=state_format, settings=AdamWSettings(1e-3))
    portable = to_portable(state, shape=shape, state_format=state_format)
    assert {key: value.dtype for key, value in portable.items()} == dict.fromkeys(portable, torch.float32)
    assert [*portable] == ["step", "exp_avg", "exp_avg_sq"]
    assert float(portable["step"]) == 1
    again = to_portable(from_portable(portable, state_format=state_format), shape=shape, state_format=state_format)
    for name in ("exp_avg_sq", "step") if state_format == "paper4bit" else portable:
        assert torch.allclose(again[name], portable[name], rtol=1e-6, atol=0)


def test_first_steps_state_loads_with_weights_only() -> None:
    buffer = io.BytesIO()
    torch.save(init_state(torch.zeros(100, 70), "paper4bit"), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["exp_avg_codes"].dtype == torch.uint8


def test_state_of_amsgrad_is_refused() -> None:
    state = dict.fromkeys(("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), torch.zeros(3))
    with pytest.raises(ValueError, match="without amsgrad"):
        from_portable(state, state_format="paper4bit")


def test_state_of_another_format_is_named() -> None:
    with pytest.raises(ValueError, match="exp_avg_codes"):
        stored_moments(init_state(torch.zeros(100, 70), "fp32"), (100, 70), "paper4bit")


def test_sparse_gradient_is_refused() -> None:
    param = torch.zeros(100, 70)
    state = init_state(param, "fp32")
    with pytest.raises(ValueError, match="sparse=False"):
        update(param, param.to_sparse(), state, state_format="fp32", settings=AdamWSettings(1e-3))
    assert float(state["step"]) == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int64])
def test_dtype_that_the_formats_do_not_take_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"torch\.optim\.AdamW"):
        state_bytes((5,), dtype, "fp32")
