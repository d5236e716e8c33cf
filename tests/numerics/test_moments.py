"""What is stored decodes to within the format's own error, whatever the shape and the magnitudes."""

import math

import pytest
import torch
from torch import Tensor

from packlight.numerics import FORMATS, Moment, MomentFormat, decode, encode, moments, zero_moment
from packlight.numerics.books import DYNAMIC_EXPONENT, E4M3_MAX, LINEAR_WITHOUT_ZERO, NORMAL_FLOAT, CodeBook
from packlight.numerics.formats import (
    DYNAMIC_BLOCKS,
    EXPANDED,
    EXPANDED_SIGNED,
    FP32,
    LINEAR_BLOCKS,
    NORMAL_BLOCKS,
    ROOT_8BIT,
    ROOT_BLOCKS,
    ROOT_MATRIX,
    SOFTSIGN_8BIT,
    matrix_view,
)
from tests.numerics.cases import NONFINITE, SHAPES, block_maxima, from_bits


def half_gap(book: CodeBook) -> float:
    """The largest distance from a number in a book's range to the nearest value."""
    low = -1.0 if book.values[0] < 0 else 0.0
    gaps = [high - middle for high, middle in zip(book.values[1:], book.midpoints, strict=True)]
    return max(book.values[0] - low, 1 - book.values[-1], *gaps)


#: Largest error of one encoding, in parts of the largest magnitude of the block, in the domain that is coded (the
#: root, where a second moment's root is). A root below the first level has the error 1 level; softsign's slope is at
#: most 2, and its step 1 / 127; bf16 scales are up to 2^-7 larger than the maximum.
BLOCK_ERROR = {
    "book normal": (NORMAL_BLOCKS, half_gap(NORMAL_FLOAT)),
    "book dynamic": (DYNAMIC_BLOCKS, half_gap(DYNAMIC_EXPONENT)),
    "book linear": (LINEAR_BLOCKS, half_gap(LINEAR_WITHOUT_ZERO)),
    "root 4 bit": (ROOT_BLOCKS, 1 / 16),
    "root 8 bit": (ROOT_8BIT, (1 + 2**-7) / 256),
    "softsign": (SOFTSIGN_8BIT, (1 + 2**-7) * 2 / 254),
    "fp32": (FP32, 0.0),
}
#: Levels are counted against a number 2^-16 below their number, and a handful of fp32 operations round.
SLACK = 2.0**-15
BLOCK_SCALED = [
    NORMAL_BLOCKS,
    DYNAMIC_BLOCKS,
    LINEAR_BLOCKS,
    ROOT_BLOCKS,
    ROOT_8BIT,
    SOFTSIGN_8BIT,
    EXPANDED,
    EXPANDED_SIGNED,
]
by_format = pytest.mark.parametrize(
    "moment_format", BLOCK_SCALED, ids=lambda each: f"{each.coding}-{each.bits}-{each.signed}"
)


def drawn(shape: tuple[int, ...], moment_format: MomentFormat, *, spread: int = 4) -> Tensor:
    """Values over some orders of magnitude, without a sign where the format has none."""
    values = torch.randn(shape) * torch.rand(shape) ** spread
    return values if moment_format.signed else values.square()


def coded(values: Tensor, moment_format: MomentFormat) -> Tensor:
    return values.double().sqrt() if moment_format.coding == "root" else values.double()


# Errors


@pytest.mark.parametrize("shape", [*SHAPES, (), (1,), (127,), (3, 43)])
@pytest.mark.parametrize("name", BLOCK_ERROR)
def test_decoding_stays_within_the_formats_error(name: str, shape: tuple[int, ...], seed: int) -> None:
    moment_format, error = BLOCK_ERROR[name]
    values = drawn(shape, moment_format)
    exact, stored = coded(values, moment_format), coded(decode(encode(values, moment_format)), moment_format)
    bound = (error + SLACK * (error > 0)) * block_maxima(exact, moment_format.block_elements)
    assert bool(((stored - exact).abs() <= bound).all())


@pytest.mark.parametrize("shape", [(256, 384), (100, 333), (130, 129, 3)])
def test_a_matrix_is_coded_relative_to_rows_and_columns(shape: tuple[int, ...], seed: int) -> None:
    rows, columns = torch.rand(shape[0], *[1] * (len(shape) - 1)) ** 4, torch.rand(shape[-1]) ** 4
    values = (torch.randn(shape) * rows * columns).square()
    view = matrix_view(shape)
    assert view is not None
    root, moment = values.double().sqrt().view(view), encode(values, ROOT_MATRIX)
    rows, columns = moment.tensors["rows"].double(), moment.tensors["cols"].double()
    least = torch.minimum(rows[0, :, None], columns[0])
    bound = (1 / 16 + SLACK) * block_maxima(root / least, 128) * least
    assert bool(((decode(moment).double().sqrt().view(view) - root).abs() <= bound).all())
    assert float((root / least).max()) <= 1 + 2**-23
    for used in (0, 1):  # for decoding now and for encoding at the next step
        assert float(rows[used].max()) == pytest.approx(float(root.max()), rel=2**-23)
        assert float(columns[used].max()) == pytest.approx(float(root.max()), rel=2**-23)


@pytest.mark.parametrize("spread", [1, 4, 12])
@pytest.mark.parametrize("moment_format", [EXPANDED, EXPANDED_SIGNED], ids=["unsigned", "signed"])
def test_expansion_keeps_e4m3s_error_in_the_expanded_domain(
    moment_format: MomentFormat, spread: int, seed: int
) -> None:
    values = drawn((5003,), moment_format, spread=spread)
    moment = encode(values, moment_format)
    power = moment.tensors["power"].double().repeat_interleave(128)[:5003] / 16
    largest = block_maxima(values, 128).double()
    exact = (values.double().abs() / largest) ** power
    stored = (decode(moment).double().abs() / largest) ** power
    # Three bits after the leading one; below 2^-6 the spacing is 2^-9; unsigned numbers have no code for 0.
    least = 2.0**-10 if moment_format.signed else 2.0**-9
    bound = torch.maximum(exact * 2**-4, torch.tensor(least / E4M3_MAX)) * (1 + 1e-4)
    assert bool(((stored - exact).abs() <= bound).all())
    assert bool((decode(moment) * values >= 0).all())
    assert bool((power >= 1).all())


@pytest.mark.parametrize("moment_format", [ROOT_8BIT, SOFTSIGN_8BIT], ids=["root", "softsign"])
def test_a_bf16_scale_is_the_least_that_is_not_below_the_maximum(moment_format: MomentFormat, seed: int) -> None:
    values = drawn((5003,), moment_format)
    scale = encode(values, moment_format).tensors["scale"].float()
    largest = block_maxima(values if moment_format.signed else values.sqrt(), 32)[::32]
    assert bool((scale >= largest).all())
    assert bool((from_bits(scale.view(torch.int32) - 0x10000) < largest).all())


@pytest.mark.parametrize("moment_format", [NORMAL_BLOCKS, LINEAR_BLOCKS, ROOT_BLOCKS], ids=["normal", "linear", "root"])
def test_encoding_what_was_decoded_gives_the_same_codes(moment_format: MomentFormat, seed: int) -> None:
    first = encode(drawn((5003,), moment_format), moment_format)
    second = encode(decode(first), moment_format)
    assert torch.equal(second.tensors["codes"], first.tensors["codes"])
    torch.testing.assert_close(second.tensors["scale"], first.tensors["scale"], rtol=SLACK, atol=0)


# Magnitudes


@by_format
@pytest.mark.parametrize("exponent", [-60, -28, 40])
def test_powers_of_two_change_scales_and_no_code(moment_format: MomentFormat, exponent: int, seed: int) -> None:
    values = drawn((5003,), moment_format)
    factor = 2.0**exponent
    one, other = encode(values, moment_format), encode(values * factor, moment_format)
    assert torch.equal(one.tensors["codes"], other.tensors["codes"])
    assert torch.equal(decode(one) * factor, decode(other))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5003,), (256, 384)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_new_moment_decodes_to_zeros(name: str, shape: tuple[int, ...]) -> None:
    chosen = FORMATS[name]
    for moment_format in (chosen.exp_avg, chosen.exp_avg_sq if len(shape) == 2 else chosen.exp_avg_sq_flat):
        assert torch.equal(decode(zero_moment(shape, moment_format)), torch.zeros(shape))
        assert torch.equal(decode(encode(torch.zeros(shape), moment_format)), torch.zeros(shape))


@by_format
def test_a_block_of_zeros_decodes_to_zeros_beside_others(moment_format: MomentFormat, seed: int) -> None:
    values = drawn((5003,), moment_format).abs() + 1e-3
    values[128:256], values[4992:] = 0, 0
    decoded = decode(encode(values, moment_format))
    assert bool((decoded[values == 0] == 0).all())
    assert bool(decoded.isfinite().all())


def test_zero_rows_and_columns_of_a_matrix_stay_finite(seed: int) -> None:
    values = torch.rand(256, 384)
    values[3], values[:, 7], values[10:14] = 0, 0, 0
    decoded = decode(encode(values, ROOT_MATRIX))
    assert bool((decoded[3] == 0).all() and (decoded[10:14] == 0).all())
    assert bool(decoded.isfinite().all())


@by_format
def test_numbers_too_small_for_a_reciprocal_decode_to_no_more_than_their_largest(moment_format: MomentFormat) -> None:
    values = torch.full((256,), 1e-40)
    values = values if moment_format.coding != "root" else values.square()
    decoded = decode(encode(values, moment_format))
    assert bool(((decoded >= 0) & (decoded <= 1.01e-40)).all())


@by_format
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 5)])
def test_no_axis_and_no_element_are_shapes_too(moment_format: MomentFormat, shape: tuple[int, ...]) -> None:
    moment = encode(torch.ones(shape), moment_format)
    assert (moment.shape, moment.numel) == (shape, math.prod(shape))
    torch.testing.assert_close(decode(moment), torch.ones(shape), rtol=2**-7, atol=0)


# NaN and infinity


@by_format
@pytest.mark.parametrize("kind", NONFINITE)
def test_a_block_with_a_nan_or_an_infinity_decodes_to_no_number(
    moment_format: MomentFormat, kind: str, seed: int
) -> None:
    values = drawn((5003,), moment_format).abs() + 1e-3
    values[300] = from_bits(NONFINITE[kind]).abs() if "inf" in kind else from_bits(NONFINITE[kind])
    size = moment_format.block_elements
    decoded = decode(encode(values, moment_format))
    inside = torch.arange(5003) // size == 300 // size
    assert not bool(decoded[300].isfinite())
    assert not bool(decoded[inside][decoded[inside] != 0].isfinite().any())
    assert bool(decoded[~inside].isfinite().all())


# Ranges


@by_format
@pytest.mark.parametrize("key", [None, 77])
def test_storing_range_by_range_is_storing_the_whole(moment_format: MomentFormat, key: int | None, seed: int) -> None:
    values = coded(drawn((5003,), moment_format), moment_format).float()
    whole, parts = zero_moment((5003,), moment_format), zero_moment((5003,), moment_format)
    store_range(whole, 0, values, key)
    for start, stop in ((1280, 5003), (0, 128), (128, 1280)):
        store_range(parts, start, values[start:stop], key)
    assert all(torch.equal(ours, parts.tensors[suffix]) for suffix, ours in whole.tensors.items())
    if moment_format.coding != "root":
        loaded = [moments.load(parts, start, stop) for start, stop in ((0, 384), (384, 5003))]
        assert torch.equal(torch.cat(loaded), decode(whole))


def store_range(moment: Moment, start: int, values: Tensor, key: int | None) -> None:
    if moment.format.coding == "root":
        moments.store_roots(moment, start, values, key=key)
    else:
        moments.store(moment, start, values, key=key)


@pytest.mark.parametrize("moment_format", [ROOT_BLOCKS, ROOT_8BIT, EXPANDED], ids=["root 4", "root 8", "expanded"])
def test_random_rounding_of_second_moments_is_right_on_average(moment_format: MomentFormat, seed: int) -> None:
    """By Hoeffding's inequality: two codes that are a gap apart; e^-28 is one element in 10^12."""
    values, num_keys = torch.rand(1280) * 0.9 + 0.1, 500
    roots = coded(values, moment_format).float()
    draws = torch.empty(num_keys, 1280, dtype=torch.float64)
    moment = zero_moment((1280,), moment_format)
    for key, row in enumerate(draws):
        store_range(moment, 0, roots, (seed + key * 0x9E3779B9) % 2**32)
        row.copy_(decode(moment))
    gap = float((draws.amax(0) - draws.amin(0)).amax())
    error = draws.mean(0) - values.double()
    assert float(error.abs().max()) <= gap * (28 / (2 * num_keys)) ** 0.5 + 2 * SLACK
    # Of all elements together; two share a word, so half as many are independent.
    assert abs(float(error.mean())) <= gap * (28 / (num_keys * 1280)) ** 0.5 + 2 * SLACK
