"""Stored moments as Triton functions: what `moments` and `second_moments` define.

A moment is a tuple of pointers (codes, scale, power); for halves, places and tables see `gpu_codes`, for the
table of tensors, of which `row` is one, `gpu_kernels`. WHOLE means that the tensor is whole blocks. Largest
magnitudes are taken of the bits of numbers, which are ordered as integers, NaNs above all.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 2.
"""

import triton
import triton.language as tl

from packlight.numerics.books import BORDER_SPAN
from packlight.numerics.formats import ROOT_8BIT, ROOT_BLOCKS
from packlight.numerics.gpu_codes import (
    book_codes,
    expanded_codes,
    expanded_values,
    float_of,
    load,
    magnitude_bits,
    number_of,
    offsets_of,
    root_codes,
    softsign_codes,
    softsign_values,
    uniforms,
)
from packlight.numerics.moments import SMALLEST_SCALE, levels_of

_SPAN, _SMALLEST_SCALE = tl.constexpr(BORDER_SPAN), tl.constexpr(SMALLEST_SCALE)
_LEVELS_4BIT, _LEVELS_8BIT = tl.constexpr(levels_of(ROOT_BLOCKS)), tl.constexpr(levels_of(ROOT_8BIT))
_INFINITY, _NAN = tl.constexpr(0x7F800000), tl.constexpr(0x7FC00000)


# Scales


@triton.jit
def _load_scales(scale: tl.tensor, place: tl.tuple, factor: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """Return the scales of both halves times a factor, (1, lines) each; an infinite one becomes a NaN."""
    start, base, _, low_lines, high_lines, _, _ = place
    if WIDTH == 64:
        low = load(scale + (start >> 7), base >> 7, low_lines)
        high = low
    else:
        low = load(scale + (start >> 5), base >> 5, low_lines)
        high = load(scale + (start >> 5) + 2, base >> 5, high_lines)
    low, high = (low + (low - low)) * factor, (high + (high - high)) * factor
    return low[None, :], high[None, :]


@triton.jit
def _store_scales(
    scale: tl.tensor, place: tl.tuple, halves: tl.tuple, SPAN: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tuple:
    """Store the blocks' largest magnitudes, and return SPAN divided by them, (1, lines) for each half."""
    start, base, _, low_lines, high_lines, low_mask, high_mask = place
    low, high = magnitude_bits(halves[0], low_mask, WHOLE), magnitude_bits(halves[1], high_mask, WHOLE)
    if WIDTH == 64:
        largest = tl.max(tl.maximum(low, high), axis=0)
        low = _store_scale(scale + (start >> 7), base >> 7, low_lines, largest, SPAN)
        high = low
    else:
        low = _store_scale(scale + (start >> 5), base >> 5, low_lines, tl.max(low, axis=0), SPAN)
        high = _store_scale(scale + (start >> 5) + 2, base >> 5, high_lines, tl.max(high, axis=0), SPAN)
    return low[None, :], high[None, :]


@triton.jit
def _store_scale(scale: tl.tensor, block: tl.tensor, mask: tl.tensor, bits: tl.tensor, SPAN: tl.constexpr) -> tl.tensor:
    """Store magnitudes, as bf16 rounded up, and return SPAN divided by them, 0 where they are tiny or NaN."""
    if scale.dtype.element_ty == tl.int16:
        bits = tl.where(bits > _INFINITY, _NAN, (bits + 0xFFFF) & -0x10000)
        tl.store(scale + block, (bits >> 16).to(tl.int16), mask)
    else:
        tl.store(scale + block, float_of(bits), mask)
    usable = float_of(bits) >= _SMALLEST_SCALE
    return tl.where(usable, tl.div_rn(SPAN, tl.where(usable, float_of(bits), 1.0)), 0.0)


@triton.jit
def _store_power(
    power: tl.tensor, place: tl.tuple, halves: tl.tuple, limits: tl.tensor, SIGNED: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    """Store the largest power j whose limit is not below largest / smallest, and return it, int32, (1, lines).

    Signed zeros have a code of their own; unsigned ones need the whole range below the largest.

    Returns:
        The powers.
    """
    start, base, _, lines, _, low_mask, high_mask = place
    low, high = magnitude_bits(halves[0], low_mask, WHOLE), magnitude_bits(halves[1], high_mask, WHOLE)
    largest = tl.max(tl.maximum(low, high), axis=0)
    if SIGNED:
        low, high = tl.where(low == 0, _INFINITY, low), tl.where(high == 0, _INFINITY, high)
    else:
        low, high = tl.where(low_mask, low, _INFINITY), tl.where(high_mask, high, _INFINITY)
    ratio = tl.div_rn(float_of(largest), float_of(tl.min(tl.minimum(low, high), axis=0)))
    num_fitting = tl.zeros_like(largest)
    for shift in tl.static_range(8):
        tried = num_fitting + (128 >> shift)
        fits = (tried <= 240) & (ratio <= tl.load(limits + 15 + tl.minimum(tried, 240)))
        num_fitting = tl.where(fits, tried, num_fitting)
    found = 15 + tl.maximum(num_fitting, 1)
    tl.store(power + (start >> 7) + (base >> 7), found.to(tl.uint8), lines)
    return found[None, :]


# Codes


@triton.jit
def _load_codes(codes: tl.tensor, place: tl.tuple, BITS: tl.constexpr) -> tl.tuple:
    start, base, index, _, _, low_mask, high_mask = place
    if BITS == 4:
        offset = (base >> 1)[None, :] + index[:, None]
        byte = tl.load(codes + (start >> 1) + offset, low_mask, other=0).to(tl.int32)
        low, high = byte & 15, byte >> 4
    else:
        codes = codes + start + offsets_of(place)
        low = tl.load(codes, low_mask, other=0).to(tl.int32)
        high = tl.load(codes + 64, high_mask, other=0).to(tl.int32)
    return low, high


@triton.jit
def _store_codes(
    codes: tl.tensor, place: tl.tuple, low: tl.tensor, high: tl.tensor, BITS: tl.constexpr, WHOLE: tl.constexpr
) -> None:
    start, base, index, _, _, low_mask, high_mask = place
    if BITS == 4:
        high = high if WHOLE else tl.where(high_mask, high, 0)
        offset = (base >> 1)[None, :] + index[:, None]
        tl.store(codes + (start >> 1) + offset, (low | (high << 4)).to(tl.uint8), low_mask)
    else:
        kind = codes.dtype.element_ty
        codes = codes + start + offsets_of(place)
        tl.store(codes, low.to(kind), low_mask)
        tl.store(codes + 64, high.to(kind), high_mask)


# Moments of coding "fp32", "book", "softsign" and "expanded"


@triton.jit
def load_moment(
    moment: tl.tuple, place: tl.tuple, factor: tl.tensor, tables: tl.tuple, CODING: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tuple:
    """Return both halves of a moment, times a factor."""
    codes, scale, power = moment
    start, base, _, lines, _, low_mask, high_mask = place
    if CODING == "fp32":
        offset = offsets_of(place)
        low = load(codes + start, offset, low_mask) * factor
        high = load(codes + start, offset + 64, high_mask) * factor
    else:
        low_unit, high_unit = _load_scales(scale, place, factor, WIDTH)
        low, high = _load_codes(codes, place, 4 if CODING == "book" else 8)
        if CODING == "book":
            low, high = tl.load(tables[0] + low), tl.load(tables[0] + high)
        elif CODING == "softsign":
            low, high = softsign_values(low), softsign_values(high)
        else:
            power = tl.load(power + (start >> 7) + (base >> 7), lines, other=0).to(tl.int32)[None, :]
            low, high = expanded_values(low, power, tables[0]), expanded_values(high, power, tables[0])
        low, high = low * low_unit, high * high_unit
    return low, high


@triton.jit
def store_first(
    moment: tl.tuple,
    place: tl.tuple,
    halves: tl.tuple,
    tables: tl.tuple,
    CODING: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Encode both halves of a first moment."""
    codes, scale, _ = moment
    low, high = halves
    if CODING == "fp32":
        _store_values(codes, place, low, high)
    elif CODING == "book":
        low_inverse, high_inverse = _store_scales(scale, place, halves, _SPAN, WIDTH, WHOLE)
        low, high = book_codes(low * low_inverse, tables[1]), book_codes(high * high_inverse, tables[1])
        _store_codes(codes, place, low, high, 4, WHOLE)
    elif CODING == "softsign":
        low_inverse, high_inverse = _store_scales(scale, place, halves, 1.0, WIDTH, WHOLE)
        _store_codes(codes, place, softsign_codes(low * low_inverse), softsign_codes(high * high_inverse), 8, WHOLE)
    else:
        _store_expanded(moment, place, halves, 0, tables, True, False, WHOLE)


@triton.jit
def store_second(
    moment: tl.tuple,
    place: tl.tuple,
    halves: tl.tuple,
    word: tl.tensor,
    tables: tl.tuple,
    CODING: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Encode both halves of a second moment of coding "fp32" or "expanded"; `word` are random words."""
    if CODING == "fp32":
        _store_values(moment[0], place, halves[0], halves[1])
    else:
        _store_expanded(moment, place, halves, word, tables, False, STOCHASTIC, WHOLE)


@triton.jit
def _store_values(pointer: tl.tensor, place: tl.tuple, low: tl.tensor, high: tl.tensor) -> None:
    pointer = pointer + place[0] + offsets_of(place)
    tl.store(pointer, low, place[5])
    tl.store(pointer + 64, high, place[6])


@triton.jit
def _store_expanded(
    moment: tl.tuple,
    place: tl.tuple,
    halves: tl.tuple,
    word: tl.tensor,
    tables: tl.tuple,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    codes, scale, power = moment
    inverse, _ = _store_scales(scale, place, halves, 1.0, 64, WHOLE)
    power = _store_power(power, place, halves, tables[2], SIGNED, WHOLE)
    low_uniform, high_uniform = uniforms(word, STOCHASTIC)
    low = expanded_codes(halves[0] * inverse, power, low_uniform, tables, SIGNED, STOCHASTIC)
    high = expanded_codes(halves[1] * inverse, power, high_uniform, tables, SIGNED, STOCHASTIC)
    _store_codes(codes, place, low, high, 8, WHOLE)


# Moments of coding "root"


@triton.jit
def load_roots(
    moment: tl.tuple, place: tl.tuple, factor: tl.tensor, maxima: tl.tuple, MATRIX: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tuple:
    """Return both halves of the square roots of a moment, times a factor.

    Args:
        moment: where they are.
        place: which.
        factor: fp32.
        maxima: of both halves, where there is a matrix: the lesser of row and column maxima before the last.
        MATRIX: "" for scales of blocks alone.
        WIDTH: 64 for 4 bits, 32 for bytes.

    Returns:
        fp32.
    """
    codes, scale, _ = moment
    low, high = _load_codes(codes, place, 4 if WIDTH == 64 else 8)
    unit = tl.div_rn(factor, _LEVELS_4BIT if WIDTH == 64 else _LEVELS_8BIT)
    low_unit, high_unit = _load_scales(scale, place, unit, WIDTH)
    if MATRIX != "":
        low_unit, high_unit = maxima[0] * low_unit, maxima[1] * high_unit
    return number_of(low + 1) * low_unit, number_of(high + 1) * high_unit


@triton.jit
def store_roots(
    moment: tl.tuple,
    place: tl.tuple,
    halves: tl.tuple,
    word: tl.tensor,
    WIDTH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Encode both halves of the square roots of a moment; `word` are random words."""
    codes, scale, _ = moment
    low_uniform, high_uniform = uniforms(word, STOCHASTIC)
    levels: tl.constexpr = _LEVELS_4BIT if WIDTH == 64 else _LEVELS_8BIT
    low_inverse, high_inverse = _store_scales(scale, place, halves, levels, WIDTH, WHOLE)
    low = root_codes(halves[0] * low_inverse, low_uniform, STOCHASTIC)
    high = root_codes(halves[1] * high_inverse, high_uniform, STOCHASTIC)
    _store_codes(codes, place, low, high, 4 if WIDTH == 64 else 8, WHOLE)
