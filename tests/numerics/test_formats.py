"""The formats are the published ones, and their choice depends on the logical shape alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.numerics import FORMATS, CodeBook, moment_formats, state_format
from packlight.numerics.formats import (
    DYNAMIC_EXPONENT,
    FP32,
    LINEAR_WITHOUT_ZERO,
    MAX_RANK1_INNER_ELEMENTS,
    suits_rank1,
)

PUBLISHED_MAGNITUDES = (0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875)


def test_signed_map_is_the_published_one() -> None:
    published = sorted([0.0, 1.0, *PUBLISHED_MAGNITUDES, *(-value for value in PUBLISHED_MAGNITUDES)])
    assert DYNAMIC_EXPONENT.values == pytest.approx(published, rel=1e-12)


def test_unsigned_map_is_sixteenths_without_zero() -> None:
    assert LINEAR_WITHOUT_ZERO.values == tuple(i / 16 for i in range(1, 17))


@pytest.mark.parametrize("book", [DYNAMIC_EXPONENT, LINEAR_WITHOUT_ZERO], ids=lambda book: str(book.name))
def test_book_is_ascending_with_four_bits(book: CodeBook) -> None:
    assert book.bits == 4
    assert list(book.values) == sorted(set(book.values))
    assert len(book.midpoints) == 15


@pytest.mark.parametrize("name", ["4bit", "8bit", "fp8", "factored", ""])
def test_format_that_does_not_exist_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(ValueError, match="'fp32', 'paper4bit'"):
        state_format(name)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((4097,), "block"),
        ((100_003,), "block"),
        ((769, 1003), "rank1"),
        ((50257, 64), "rank1"),
        ((4, 5, 6, 997), "rank1"),
        ((9, MAX_RANK1_INNER_ELEMENTS), "rank1"),
        ((9, MAX_RANK1_INNER_ELEMENTS + 1), "block"),
        ((2, MAX_RANK1_INNER_ELEMENTS), "block"),
        ((100_000, 1), "block"),
        ((2**20, 64), "block"),
    ],
)
def test_second_moment_is_rank1_only_where_it_suits(shape: tuple[int, ...], rule: str) -> None:
    exp_avg, exp_avg_sq = moment_formats("paper4bit", shape)
    assert exp_avg == FORMATS["paper4bit"].exp_avg
    assert exp_avg_sq.scale == rule


@pytest.mark.parametrize("shape", [(), (0,), (1,), (4096,), (64, 64), (2, 2, 1024)])
def test_small_tensor_stays_fp32(shape: tuple[int, ...]) -> None:
    assert moment_formats("paper4bit", shape) == (FP32, FP32)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple))
def test_scales_never_outweigh_the_codes(shape: tuple[int, ...]) -> None:
    for moment in moment_formats("paper4bit", shape):
        assert moment.scale_bytes(shape) <= moment.code_bytes(shape)
    assert suits_rank1(shape) is False or len(shape) > 1
