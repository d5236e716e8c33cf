"""A 16-bit parameter rounds to nearest, at random without a bias, or loses nothing or next to nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from packlight.numerics.rounding import ERROR_DTYPES, Rounding, RoundingName, read_parameter, write_parameter
from tests.numerics.cases import NONFINITE, from_bits, same

ROUNDINGS: tuple[RoundingName, ...] = ("nearest", "stochastic", "master24", "master32")
#: The mean of n random roundings is within this many standard deviations; beyond it lies one run in 10^9.
DEVIATIONS = 6.1


def written(
    values: Tensor, name: RoundingName, *, dtype: torch.dtype = torch.bfloat16, key: int = 1
) -> tuple[Tensor, Rounding]:
    """A parameter that was given these values."""
    error = ERROR_DTYPES.get(name)
    rounding = Rounding(name, None if error is None else torch.ones(values.numel(), dtype=error))
    param = torch.zeros(values.shape, dtype=dtype)
    write_parameter(param, 0, values.numel(), values.reshape(-1), rounding, key=key)
    return param, rounding


def any_finite(number: int) -> Tensor:
    """fp32 numbers of any size, of both signs."""
    sign = torch.randint(2, (number,), dtype=torch.int32) * -(2**31)
    return from_bits(torch.randint(0x7F7F0000, (number,), dtype=torch.int32) | sign)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nearest_is_torchs_own_cast(dtype: torch.dtype, seed: int) -> None:
    values = any_finite(10_000)
    assert torch.equal(written(values, "nearest", dtype=dtype)[0], values.to(dtype))


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_number_that_the_parameter_can_hold_is_kept(name: RoundingName, seed: int) -> None:
    values = any_finite(10_000).bfloat16().float()
    param, rounding = written(values, name)
    assert torch.equal(param.float(), values)
    assert torch.equal(read_parameter(param, 0, 10_000, rounding), values)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("kind", NONFINITE)
def test_nan_and_infinity_stay_what_they_are(name: RoundingName, kind: str) -> None:
    values = torch.ones(4)
    values[2] = from_bits(NONFINITE[kind])
    param, rounding = written(values, name)
    assert same(param.float(), values)
    assert same(read_parameter(param, 0, 4, rounding), values)


def test_random_rounding_takes_one_of_the_two_neighbours(seed: int) -> None:
    values = any_finite(100_000)
    rounded = written(values, "stochastic")[0].float()
    low, high = from_bits(values.view(torch.int32) & -0x10000), from_bits((values.view(torch.int32) | 0xFFFF) + 1)
    assert bool(((rounded == low) | (rounded == high)).all())


@pytest.mark.parametrize("value", [1.001, -1.0001, 1.0039, 3e-5, 1e30])
def test_random_rounding_is_right_on_average(value: float, seed: int) -> None:
    number = 2**18
    values = torch.full((number,), value)
    rounded = written(values, "stochastic", key=seed)[0].double()
    exact, low = float(values[0]), float(from_bits(values.view(torch.int32)[0] & -0x10000))
    gap = 2.0**-7 * 2.0 ** torch.tensor(abs(exact)).log2().floor().item()
    up = abs(exact - low) / gap
    # Elements that share a word have halves of it: no bit in common.
    assert abs(float(rounded.mean()) - exact) <= DEVIATIONS * gap * (up * (1 - up) / number) ** 0.5


def test_random_rounding_changes_with_the_key_and_not_with_the_range(seed: int) -> None:
    values = torch.randn(1000)
    whole, other = written(values, "stochastic", key=5)[0], written(values, "stochastic", key=6)[0]
    parts = torch.zeros(1000, dtype=torch.bfloat16)
    for start, stop in ((0, 256), (256, 640), (640, 1000)):
        write_parameter(parts, start, stop, values[start:stop], Rounding("stochastic"), key=5)
    assert torch.equal(parts, whole)
    assert not torch.equal(other, whole)


@given(st.integers(0, 0x7F7FFFFF), st.booleans())
def test_16_error_bits_lose_nothing(bits: int, negative: bool) -> None:
    values = from_bits(bits - 2**31 if negative else bits).view(1)
    param, rounding = written(values, "master32")
    assert torch.equal(read_parameter(param, 0, 1, rounding).view(torch.int32), values.view(torch.int32))


def test_8_error_bits_lose_half_of_the_bits_below_them(seed: int) -> None:
    values = any_finite(200_000)
    param, rounding = written(values, "master24")
    kept = read_parameter(param, 0, values.numel(), rounding).view(torch.int32)
    assert rounding.error is not None
    lost = (kept - values.view(torch.int32)).abs()
    # An error is a multiple of 256 units, rounded to nearest, except that 127 stands for 128 too.
    assert int(lost[rounding.error < 127].max()) <= 128
    assert int(lost.max()) <= 255


@pytest.mark.parametrize("name", ["master24", "master32"])
def test_with_error_bits_the_parameter_itself_is_the_nearest(name: RoundingName, seed: int) -> None:
    values = any_finite(100_000)
    param, _ = written(values, name)
    nearest = values.bfloat16()
    tie = (values.view(torch.int32) & 0xFFFF) == 0x8000  # then away from zero, not to even
    assert torch.equal(param[~tie], nearest[~tie])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in ROUNDINGS), ("nearest", torch.float16), ("nearest", torch.float32)],
)
def test_strides_change_nothing(name: RoundingName, dtype: torch.dtype, seed: int) -> None:
    values = torch.randn(30, 50)
    plain, rounding = written(values, name, dtype=dtype)
    strided = torch.zeros(50, 30, dtype=dtype).t()
    other = rounding._replace(error=None if rounding.error is None else torch.zeros_like(rounding.error))
    for start, stop in ((0, 128), (128, 1408), (1408, 1500)):
        write_parameter(strided, start, stop, values.view(-1)[start:stop], other, key=1)
        expected = read_parameter(plain, start, stop, rounding)
        assert torch.equal(read_parameter(strided, start, stop, other), expected)
    assert torch.equal(strided, plain)
