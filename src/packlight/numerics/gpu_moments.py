"""Stored moments as Triton functions: what `moments` and `second_moments` define.

A moment is a tuple of pointers (codes, scale, power); for halves, places and tables see `gpu_codes`. Largest
magnitudes are taken of the bits of numbers, which are ordered as integers, NaNs above all.

Rows and columns of a matrix are indices that broadcast to a half: (rows, 1) and (1, width) where a tile is a part
of a strip of 128 columns, (rows, width) both where blocks straddle rows.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 2.
"""

from typing import Any

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
def _load_scales(scale: Any, place: Any, factor: Any, WIDTH: tl.constexpr) -> Any:
    """Return the scales of both halves times a factor, (rows, 1) each."""
    base, _, numel = place
    if WIDTH == 64:
        low = load(scale, base >> 7, base < numel) * factor
        high = low
    else:
        low = load(scale, base >> 5, base < numel) * factor
        high = load(scale, (base >> 5) + 2, base + 64 < numel) * factor
    return low[:, None], high[:, None]


@triton.jit
def _store_scales(scale: Any, place: Any, halves: Any, SPAN: tl.constexpr, WIDTH: tl.constexpr) -> Any:
    """Store the blocks' largest magnitudes, and return SPAN divided by them, (rows, 1) for each half."""
    base, _, numel = place
    _, low_mask, high_mask = offsets_of(place)
    low, high = magnitude_bits(halves[0], low_mask), magnitude_bits(halves[1], high_mask)
    if WIDTH == 64:
        low = _store_scale(scale, base >> 7, base < numel, tl.max(tl.maximum(low, high), axis=1), SPAN)
        high = low
    else:
        low = _store_scale(scale, base >> 5, base < numel, tl.max(low, axis=1), SPAN)
        high = _store_scale(scale, (base >> 5) + 2, base + 64 < numel, tl.max(high, axis=1), SPAN)
    return low[:, None], high[:, None]


@triton.jit
def _store_scale(scale: Any, block: Any, mask: Any, bits: Any, SPAN: tl.constexpr) -> Any:
    """Store magnitudes, as bf16 rounded up, and return SPAN divided by them, 0 where they are tiny or NaN."""
    if scale.dtype.element_ty == tl.int16:
        bits = tl.where(bits > _INFINITY, _NAN, (bits + 0xFFFF) & -0x10000)
        tl.store(scale + block, (bits >> 16).to(tl.int16), mask)
    else:
        tl.store(scale + block, float_of(bits), mask)
    usable = float_of(bits) >= _SMALLEST_SCALE
    return tl.where(usable, tl.div_rn(SPAN, tl.where(usable, float_of(bits), 1.0)), 0.0)


@triton.jit
def _store_power(power: Any, place: Any, halves: Any, limits: Any, SIGNED: tl.constexpr) -> Any:
    """Store the largest power j whose limit is not below largest / smallest, and return it, int32, (rows, 1).

    Signed zeros have a code of their own; unsigned ones need the whole range below the largest.
    """
    base, _, numel = place
    _, low_mask, high_mask = offsets_of(place)
    low, high = magnitude_bits(halves[0], low_mask), magnitude_bits(halves[1], high_mask)
    largest = tl.max(tl.maximum(low, high), axis=1)
    if SIGNED:
        low, high = tl.where(low == 0, _INFINITY, low), tl.where(high == 0, _INFINITY, high)
    else:
        low, high = tl.where(low_mask, low, _INFINITY), tl.where(high_mask, high, _INFINITY)
    ratio = tl.div_rn(float_of(largest), float_of(tl.min(tl.minimum(low, high), axis=1)))
    num_fitting = tl.zeros_like(largest)
    for shift in tl.static_range(8):
        tried = num_fitting + (128 >> shift)
        fits = (tried <= 240) & (ratio <= tl.load(limits + 15 + tl.minimum(tried, 240)))
        num_fitting = tl.where(fits, tried, num_fitting)
    found = 15 + tl.maximum(num_fitting, 1)
    tl.store(power + (base >> 7), found.to(tl.uint8), base < numel)
    return found[:, None]


# Codes


@triton.jit
def _load_codes(codes: Any, place: Any, BITS: tl.constexpr) -> Any:
    base, index, _ = place
    offset, low_mask, high_mask = offsets_of(place)
    if BITS == 4:
        byte = tl.load(codes + (base >> 1)[:, None] + index[None, :], low_mask, other=0).to(tl.int32)
        low, high = byte & 15, byte >> 4
    else:
        low = tl.load(codes + offset, low_mask, other=0).to(tl.int32)
        high = tl.load(codes + offset + 64, high_mask, other=0).to(tl.int32)
    return low, high


@triton.jit
def _store_codes(codes: Any, place: Any, low: Any, high: Any, BITS: tl.constexpr) -> None:
    base, index, _ = place
    offset, low_mask, high_mask = offsets_of(place)
    if BITS == 4:
        byte = low | (tl.where(high_mask, high, 0) << 4)
        tl.store(codes + (base >> 1)[:, None] + index[None, :], byte.to(tl.uint8), low_mask)
    else:
        tl.store(codes + offset, low.to(codes.dtype.element_ty), low_mask)
        tl.store(codes + offset + 64, high.to(codes.dtype.element_ty), high_mask)


# Moments of coding "fp32", "book", "softsign" and "expanded"


@triton.jit
def load_moment(moment: Any, place: Any, factor: Any, tables: Any, CODING: tl.constexpr, WIDTH: tl.constexpr) -> Any:
    """Return both halves of a moment, times a factor."""
    codes, scale, power = moment
    if CODING == "fp32":
        offset, low_mask, high_mask = offsets_of(place)
        low, high = load(codes, offset, low_mask) * factor, load(codes, offset + 64, high_mask) * factor
    else:
        low_unit, high_unit = _load_scales(scale, place, factor, WIDTH)
        low, high = _load_codes(codes, place, 4 if CODING == "book" else 8)
        if CODING == "book":
            low, high = tl.load(tables[0] + low), tl.load(tables[0] + high)
        elif CODING == "softsign":
            low, high = softsign_values(low), softsign_values(high)
        else:
            row = tl.load(power + (place[0] >> 7), place[0] < place[2], other=0).to(tl.int32)[:, None]
            low, high = expanded_values(low, row, tables[0]), expanded_values(high, row, tables[0])
        low, high = low * low_unit, high * high_unit
    return low, high


@triton.jit
def store_first(moment: Any, place: Any, halves: Any, tables: Any, CODING: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """Encode both halves of a first moment."""
    codes, scale, _ = moment
    low, high = halves
    if CODING == "fp32":
        _store_values(codes, place, low, high)
    elif CODING == "book":
        low_inverse, high_inverse = _store_scales(scale, place, halves, _SPAN, WIDTH)
        low, high = book_codes(low * low_inverse, tables[1]), book_codes(high * high_inverse, tables[1])
        _store_codes(codes, place, low, high, 4)
    elif CODING == "softsign":
        low_inverse, high_inverse = _store_scales(scale, place, halves, 1.0, WIDTH)
        _store_codes(codes, place, softsign_codes(low * low_inverse), softsign_codes(high * high_inverse), 8)
    else:
        _store_expanded(moment, place, halves, 0, tables, True, False)


@triton.jit
def store_second(
    moment: Any, place: Any, halves: Any, word: Any, tables: Any, CODING: tl.constexpr, STOCHASTIC: tl.constexpr
) -> None:
    """Encode both halves of a second moment of coding "fp32" or "expanded"; `word` are random words."""
    if CODING == "fp32":
        _store_values(moment[0], place, halves[0], halves[1])
    else:
        _store_expanded(moment, place, halves, word, tables, False, STOCHASTIC)


@triton.jit
def _store_values(pointer: Any, place: Any, low: Any, high: Any) -> None:
    offset, low_mask, high_mask = offsets_of(place)
    tl.store(pointer + offset, low, low_mask)
    tl.store(pointer + offset + 64, high, high_mask)


@triton.jit
def _store_expanded(
    moment: Any, place: Any, halves: Any, word: Any, tables: Any, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr
) -> None:
    codes, scale, power = moment
    inverse, _ = _store_scales(scale, place, halves, 1.0, 64)
    row = _store_power(power, place, halves, tables[2], SIGNED)
    low_uniform, high_uniform = uniforms(word, STOCHASTIC)
    low = expanded_codes(halves[0] * inverse, row, low_uniform, tables, SIGNED, STOCHASTIC)
    high = expanded_codes(halves[1] * inverse, row, high_uniform, tables, SIGNED, STOCHASTIC)
    _store_codes(codes, place, low, high, 8)


# Moments of coding "root"


@triton.jit
def load_roots(moment: Any, place: Any, factor: Any, maxima: Any, MATRIX: tl.constexpr, WIDTH: tl.constexpr) -> Any:
    """Return both halves of the square roots of a moment, times a factor; `maxima` those before the last."""
    codes, scale, _ = moment
    low, high = _load_codes(codes, place, 4 if WIDTH == 64 else 8)
    unit = tl.div_rn(factor, _LEVELS_4BIT if WIDTH == 64 else _LEVELS_8BIT)
    low_unit, high_unit = _load_scales(scale, place, unit, WIDTH)
    if MATRIX != "":
        low_unit, high_unit = _lesser(maxima[0], low_unit), _lesser(maxima[1], high_unit)
    return (low + 1).to(tl.float32) * low_unit, (high + 1).to(tl.float32) * high_unit


@triton.jit
def store_roots(
    moment: Any, place: Any, halves: Any, maxima: Any, word: Any,
    MATRIX: tl.constexpr, WIDTH: tl.constexpr, STOCHASTIC: tl.constexpr,
) -> None:  # fmt: skip
    """Encode both halves of the square roots of a moment; `maxima` are the last, `word` random words."""
    codes, scale, _ = moment
    low, high = halves
    if MATRIX != "":
        low, high = low * _inverse(maxima[0]), high * _inverse(maxima[1])
    low_uniform, high_uniform = uniforms(word, STOCHASTIC)
    levels: tl.constexpr = _LEVELS_4BIT if WIDTH == 64 else _LEVELS_8BIT
    low_inverse, high_inverse = _store_scales(scale, place, (low, high), levels, WIDTH)
    low = root_codes(low * low_inverse, low_uniform, STOCHASTIC)
    high = root_codes(high * high_inverse, high_uniform, STOCHASTIC)
    _store_codes(codes, place, low, high, 4 if WIDTH == 64 else 8)


@triton.jit
def _lesser(maxima: Any, unit: Any) -> Any:
    row, column = maxima[0] * unit, maxima[1] * unit
    return tl.where(row < column, row, column)


@triton.jit
def _inverse(maxima: Any) -> Any:
    """Return the larger of 1 / row and 1 / column with one quotient; both are positive."""
    return tl.div_rn(1.0, tl.minimum(maxima[0], maxima[1]))


# Row and column maxima of matrices; `row` is the tensor's in the table (`gpu_kernels`)


@triton.jit
def matrix_indices(row: Any, line: Any, column: Any, place: Any, MATRIX: tl.constexpr) -> Any:
    """Return the matrix row of each line's first element, and rows and columns of low and high half."""
    base, index, _ = place
    num_rows, num_columns = tl.load(row + 13), tl.load(row + 14)
    if MATRIX == "":
        indices = 0
    elif MATRIX == "strips":
        rows, columns = tl.minimum(line, num_rows - 1)[:, None], (tl.multiple_of(column, 128) + index)[None, :]
        indices = line, (rows, columns), (rows, columns + 64)
    else:
        first = base // num_columns
        columns = (base - first * num_columns)[:, None] + index[None, :]
        low = _wrapped(first, columns, num_rows, num_columns)
        indices = first, low, _wrapped(first, columns + 64, num_rows, num_columns)
    return indices


@triton.jit
def _wrapped(first: Any, columns: Any, num_rows: Any, num_columns: Any) -> Any:
    """Let columns beyond the last go on in the next row; blocks are no longer than rows."""
    beyond = columns >= num_columns
    rows = tl.minimum(first[:, None] + beyond.to(tl.int64), num_rows - 1)
    return rows, tl.where(beyond, columns - num_columns, columns)


@triton.jit
def load_maxima(row: Any, indices: Any, MATRIX: tl.constexpr, LAST: tl.constexpr) -> Any:
    """Return the row and column maxima of low and high half: the last, or those before."""
    if MATRIX == "":
        maxima = 0
    else:
        rows, columns = tl.load(row + 11).to(tl.pointer_type(tl.float32)), tl.load(row + 12)
        columns = tl.multiple_of(columns.to(tl.pointer_type(tl.float32)), 16 if MATRIX == "strips" else 4)
        if LAST:
            rows = rows + tl.load(row + 13)
            columns = columns + tl.multiple_of(tl.load(row + 14), 128 if MATRIX == "strips" else 1)
        low = tl.load(rows + indices[1][0]), tl.load(columns + indices[1][1])
        maxima = low, (tl.load(rows + indices[2][0]), tl.load(columns + indices[2][1]))
    return maxima


@triton.jit
def gather(maxima: Any, row: Any, indices: Any, place: Any, halves: Any, bits: Any, MATRIX: tl.constexpr) -> Any:
    """Take the maxima of both halves in: of rows at once, of columns too or into `bits`, which are returned."""
    low, high = bits
    if MATRIX != "":
        target, num_rows, line = maxima + tl.load(row + 15), tl.load(row + 13), indices[0]
        _, low_mask, high_mask = offsets_of(place)
        new_low, new_high = magnitude_bits(halves[0], low_mask), magnitude_bits(halves[1], high_mask)
        if MATRIX == "strips":
            low, high = tl.maximum(low, new_low), tl.maximum(high, new_high)
            _raise(target + line, tl.max(tl.maximum(new_low, new_high), axis=1), line < num_rows)
        else:
            low_beyond, high_beyond = indices[1][0] > line[:, None], indices[2][0] > line[:, None]
            here = tl.maximum(tl.where(low_beyond, 0, new_low), tl.where(high_beyond, 0, new_high))
            beyond = tl.maximum(tl.where(low_beyond, new_low, 0), tl.where(high_beyond, new_high, 0))
            _raise(target + line, tl.max(here, axis=1), line < num_rows)
            _raise(target + line + 1, tl.max(beyond, axis=1), line + 1 < num_rows)
            _raise(target + num_rows + indices[1][1], new_low, low_mask)
            _raise(target + num_rows + indices[2][1], new_high, high_mask)
    return low, high


@triton.jit
def gather_columns(maxima: Any, row: Any, column: Any, bits: Any, WIDTH: tl.constexpr) -> None:
    """Take in the column maxima that a strip has gathered."""
    target = maxima + tl.load(row + 15) + tl.load(row + 13) + column + tl.arange(0, WIDTH)
    _raise(target, tl.max(bits[0], axis=0), tl.arange(0, WIDTH) >= 0)
    _raise(target + 64, tl.max(bits[1], axis=0), tl.arange(0, WIDTH) >= 0)


@triton.jit
def _raise(pointer: Any, bits: Any, mask: Any) -> None:
    """Raise maxima to these bits of non-negative numbers; most are reached already, and cost a load."""
    reached = tl.load(pointer, mask, other=0)
    tl.atomic_max(pointer, bits, mask & (bits > reached), sem="relaxed")
