"""Books are the published ones, and one table look-up finds the nearest of their values."""

import math
from statistics import NormalDist

import pytest
import torch

from packlight.numerics.books import (
    BORDER_SPAN,
    DYNAMIC_EXPONENT,
    E4M3_MAX,
    LINEAR_WITHOUT_ZERO,
    NORMAL_FLOAT,
    CodeBook,
    e4m3_magnitudes,
    expanded_tables,
)
from tests.numerics.cases import from_bits

BOOKS = [NORMAL_FLOAT, DYNAMIC_EXPONENT, LINEAR_WITHOUT_ZERO]
PUBLISHED_MAGNITUDES = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)
CPU = torch.device("cpu")


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: str(book.name))
def test_a_book_is_ascending_with_four_bits(book: CodeBook) -> None:
    assert book.bits == 4
    assert list(book.values) == sorted(set(book.values))
    assert len(book.midpoints) == len(book.borders) == 15
    assert list(book.borders) == sorted(set(book.borders))


def test_the_dynamic_exponent_map_is_the_published_one() -> None:
    published = sorted([0.0, 1.0, *PUBLISHED_MAGNITUDES, *(-value for value in PUBLISHED_MAGNITUDES)])
    assert DYNAMIC_EXPONENT.values == pytest.approx(published, rel=1e-12)


def test_the_linear_map_is_sixteenths_without_zero() -> None:
    assert LINEAR_WITHOUT_ZERO.values == tuple(i / 16 for i in range(1, 17))


def test_normal_float_has_the_published_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, appendix E, as bitsandbytes computes it: 8 quantiles above zero, 7 below, and zero."""
    quantile, least = NormalDist().inv_cdf, 0.9677083
    above = [quantile(least + (0.5 - least) * i / 8) for i in range(8)]
    below = [-quantile(least + (0.5 - least) * i / 7) for i in range(7)]
    expected = [value / max(above) for value in sorted([*above, 0.0, *below])]
    assert NORMAL_FLOAT.values == pytest.approx(expected, abs=2e-7)  # the published ones are fp32 numbers


# Borders and cells


def test_a_tagged_border_tells_the_code_below_it_and_is_within_15_ulp_of_the_midpoint() -> None:
    for code, (border, middle) in enumerate(zip(NORMAL_FLOAT.borders, NORMAL_FLOAT.midpoints, strict=True)):
        bits, exact = (int(torch.tensor(x).view(torch.int32)) for x in (border, middle * BORDER_SPAN))
        assert bits & 15 == code
        assert abs(bits - exact) <= 15


def test_without_a_span_borders_are_the_midpoints() -> None:
    assert DYNAMIC_EXPONENT.borders == DYNAMIC_EXPONENT.midpoints


def test_one_cell_and_one_comparison_give_the_nearest_code(seed: int) -> None:
    borders = torch.tensor(NORMAL_FLOAT.borders)
    halves = torch.arange(-15, 16) - 0.5
    points = torch.cat([borders, halves, torch.linspace(-BORDER_SPAN, BORDER_SPAN, 200_001)])
    points = torch.cat([points, points.nextafter(torch.tensor(99.0)), points.nextafter(torch.tensor(-99.0))])
    points = points.clamp(-BORDER_SPAN, BORDER_SPAN)
    cells = torch.tensor(NORMAL_FLOAT.cells, dtype=torch.int32)[(torch.round(points) + 15).int()]
    codes = (cells & 15) + (points > from_bits(cells)).int()
    assert torch.equal(codes, torch.bucketize(points, borders).int())


def test_two_borders_in_a_cell_are_refused() -> None:
    crowded = CodeBook("crowded", (*(-1 + i / 100 for i in range(15)), 1.0), span=BORDER_SPAN)
    with pytest.raises(AssertionError, match="two borders"):
        _ = crowded.cells


# FP8


def test_e4m3_magnitudes_are_those_of_the_formula() -> None:
    def magnitude(code: int) -> float:
        exponent, mantissa = code >> 3, code & 7
        return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)

    assert e4m3_magnitudes() == tuple(magnitude(code) for code in range(127))
    assert e4m3_magnitudes()[-1] == E4M3_MAX


@pytest.mark.parametrize("power", [16, 17, 40, 128, 255])
def test_expanded_values_are_powers_of_e4m3_numbers_with_borders_between_them(power: int) -> None:
    values, borders, limits = (table[power].double() for table in expanded_tables(CPU))
    exact = [(magnitude / E4M3_MAX) ** (16 / power) for magnitude in e4m3_magnitudes()]
    torch.testing.assert_close(values[:127], torch.tensor(exact, dtype=torch.float64), rtol=2**-24, atol=0)
    assert values[126] == values[127] == 1
    assert bool((values[:126] < borders[:126]).all() and (borders[:126] < values[1:127]).all())
    assert bool(borders[126:].isinf().all())
    if power > 16:
        # the smallest number of a block with just this range is at least the second code: it has two bits
        assert float(1 / limits) == pytest.approx(float(values[2] * (2**9 / E4M3_MAX) ** (16 / power)), rel=1e-6)


def test_a_range_never_needs_less_than_the_power_one() -> None:
    values, _, limits = expanded_tables(CPU)
    assert bool(limits[:17].isinf().all())
    assert bool((limits[17:].diff() < 0).all())
    assert all(torch.equal(values[power], values[16]) for power in range(17))
    assert math.isclose(float(limits[255]), (E4M3_MAX**2 / 2) ** (16 / 255), rel_tol=1e-6)
