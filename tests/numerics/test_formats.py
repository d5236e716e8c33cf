"""A format's bytes are those of its tensors, and the choice of one depends on the logical shape alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packlight.numerics import FORMATS, MomentFormat, decode, encode, moment_formats, state_format, zero_moment
from packlight.numerics.formats import (
    FACTORED,
    FP32,
    MAX_RANK1_INNER_ELEMENTS,
    matrix_view,
    suits,
    suits_rank1,
)

#: Every moment format there is, by a name for messages.
MOMENT_FORMATS = {
    f"{name}-{role}": getattr(each, role)
    for name, each in FORMATS.items()
    for role in ("exp_avg", "exp_avg_sq", "exp_avg_sq_flat")
}
SECOND_MOMENTS = {key: each for key, each in MOMENT_FORMATS.items() if "sq" in key and each not in (FP32, FACTORED)}
shapes = st.lists(st.integers(1, 300), min_size=0, max_size=4).map(tuple).filter(lambda shape: math.prod(shape) < 10**6)


# Bytes


@given(shapes, st.sampled_from(sorted(FORMATS)))
def test_the_byte_formula_is_the_bytes_of_the_tensors(shape: tuple[int, ...], name: str) -> None:
    for moment_format in moment_formats(name, shape):
        tensors = zero_moment(shape, moment_format).tensors
        assert moment_format.nbytes(shape) == sum(tensor.nbytes for tensor in tensors.values())
        assert {suffix: (tuple(t.shape), t.dtype) for suffix, t in tensors.items()} == moment_format.tensors(shape)


@given(st.integers(0, 700), st.sampled_from(sorted(MOMENT_FORMATS)))
def test_the_byte_formula_holds_for_every_length_of_the_last_block(numel: int, key: str) -> None:
    moment_format = MOMENT_FORMATS[key]
    if suits(moment_format, (numel,)):
        moment = encode(torch.ones(numel), moment_format)
        assert moment_format.nbytes((numel,)) == sum(tensor.nbytes for tensor in moment.tensors.values())


@pytest.mark.parametrize(
    ("name", "bytes_per_element"),
    [
        ("fp32", 8),
        ("4bit", 2 * (1 / 2 + 4 / 128) + 8 * (4096 + 4096) / 4096**2),
        ("8bit", 2 * (1 + 2 / 32)),
        ("fp8", 2 * (1 + 5 / 128)),
        ("paper4bit", 1 / 2 + 4 / 128 + 1 / 2 + 4 * (4096 + 4096) / 4096**2),
        ("factored", 1 / 2 + 4 / 128 + 4 * (4096 + 4096) / 4096**2),
    ],
)
def test_a_large_matrix_costs_what_the_format_says(name: str, bytes_per_element: float) -> None:
    shape = (4096, 4096)
    assert sum(each.nbytes(shape) for each in moment_formats(name, shape)) == bytes_per_element * 4096**2


@given(shapes.filter(lambda shape: math.prod(shape) > 4096))
def test_scales_never_outweigh_the_codes(shape: tuple[int, ...]) -> None:
    for name in ("4bit", "8bit", "fp8", "paper4bit"):
        for moment_format in moment_formats(name, shape):
            sizes = moment_format.tensors(shape)
            (codes,), _ = sizes["codes"]
            assert codes <= moment_format.nbytes(shape) <= 2 * codes + 16  # 16: of a last, short block


# Which format a shape gets


@pytest.mark.parametrize("name", ["4-bit", "", "FP32", "nf4"])
def test_a_format_that_does_not_exist_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(ValueError, match="'fp32', '4bit', '8bit', 'fp8', 'paper4bit', 'factored'"):
        state_format(name)
    with pytest.raises(ValueError, match="unknown state format"):
        moment_formats(name, (64, 128))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 128), (1,), (4096,), (64, 64), (2, 2, 1024)])
def test_a_small_tensor_stays_fp32(shape: tuple[int, ...], name: str) -> None:
    assert moment_formats(name, shape) == (FP32, FP32)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4096, 4096), (4096, 4096)),
        ((128, 128), (128, 128)),
        ((127, 129), None),  # 256 scales for 16383 elements
        ((1000, 127), None),  # rows shorter than a block
        ((1000, 128), (1000, 128)),
        ((65, 2**16), (65, 2**16)),
        ((64, 2**16), None),  # as many columns as elements by 64, and the rows besides
        ((100, 2**16 + 1), None),  # too many columns
        ((512, 256, 3, 3), (512, 2304)),
        ((64, 64, 1, 1), None),
        ((64, 3, 7, 7), None),
        ((8, 256, 512), (2048, 512)),
        ((8, 2048, 64), None),
        ((8, 2048, 64, 16), (16384, 1024)),
        ((1, 2**17), None),
        ((2**17,), None),
        ((), None),
    ],
)
def test_a_tensor_is_the_matrix_with_the_fewest_scales(
    shape: tuple[int, ...], expected: tuple[int, int] | None
) -> None:
    assert matrix_view(shape) == expected


@given(shapes)
def test_a_matrix_view_is_the_best_of_those_that_the_rules_allow(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    cuts = [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, len(shape))]
    allowed = [(r, c) for r, c in cuts if r > 1 and 128 <= c <= 2**16 and 64 * (r + c) <= numel]
    view = matrix_view(shape)
    assert (view is None) == (not allowed)
    if view is not None:
        assert view in allowed
        assert sum(view) == min(map(sum, allowed))
        assert matrix_view(list(shape)) == view


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
def test_the_published_second_moment_is_rank1_only_where_it_suits(shape: tuple[int, ...], rule: str) -> None:
    exp_avg, exp_avg_sq = moment_formats("paper4bit", shape)
    assert exp_avg == FORMATS["paper4bit"].exp_avg
    assert exp_avg_sq.scale == rule
    assert suits_rank1(shape) == (rule == "rank1")


@pytest.mark.parametrize(
    ("shape", "scale"), [((5003,), "block"), ((5003, 1), "factored"), ((3, 4, 5, 100), "factored")]
)
def test_a_factored_second_moment_needs_two_axes(shape: tuple[int, ...], scale: str) -> None:
    assert moment_formats("factored", shape)[1].scale == scale


@pytest.mark.parametrize("shape", [(5003,), (100, 130), (8, 2048, 64)])
def test_blocks_take_the_place_of_a_matrix_that_does_not_pay(shape: tuple[int, ...]) -> None:
    assert moment_formats("4bit", shape)[1] == FORMATS["4bit"].exp_avg_sq_flat


# What codes stand for


@pytest.mark.parametrize("key", SECOND_MOMENTS)
def test_no_code_of_a_second_moment_stands_for_zero(key: str) -> None:
    moment_format: MomentFormat = SECOND_MOMENTS[key]
    values = torch.zeros(128, 256)
    values[0], values[:, ::32] = 1.0, 1.0  # no block, row or column is all zeros
    values[1::2, 1::32] = 1e-12
    assert bool((decode(encode(values, moment_format)) > 0).all())


@pytest.mark.parametrize("key", [key for key in SECOND_MOMENTS if "rank" not in SECOND_MOMENTS[key].scale])
@pytest.mark.parametrize("exponent", [-117, -119, -130])
def test_below_the_smallest_scale_a_second_moment_is_the_least_part_of_it_or_zero(key: str, exponent: int) -> None:
    values = torch.full((128, 256), 2.0**exponent)
    values[:, 1::2] = 0
    decoded = decode(encode(values, SECOND_MOMENTS[key]))
    assert bool((decoded >= 0).all())
    assert bool((decoded <= 1.01 * 2.0**exponent).all())  # 1.01: bf16 scales are rounded up
    if exponent > -118:
        assert bool((decoded > 0).all())


def test_fp32_alone_stores_a_zero_second_moment_as_zero() -> None:
    assert decode(encode(torch.zeros(100), FP32)).count_nonzero() == 0


@pytest.mark.parametrize("key", [key for key in MOMENT_FORMATS if key.endswith("exp_avg")])
def test_first_moments_have_a_code_for_zero(key: str) -> None:
    values = torch.zeros(300)
    values[::3] = -1.0
    decoded = decode(encode(values, MOMENT_FORMATS[key]))
    assert bool((decoded[values == 0] == 0).all())
    assert bool((decoded[values != 0] < -0.8).all())
