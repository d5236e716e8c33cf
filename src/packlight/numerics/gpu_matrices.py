"""Row and column maxima of matrices as Triton functions: what `second_moments.Matrix` defines.

Old maxima decode and last maxima encode: `rows` is (2, rows), `cols` (2, columns), old ones first. New ones are
gathered in a buffer of int32 zeros, as the bits of non-negative numbers, which are ordered as integers.

    MATRIX "strips"   a row is whole blocks: a program goes down 128 columns, whose maxima it loads once and
                      gathers in registers until it ends
    MATRIX "blocks"   blocks straddle rows: two rows at most, as they are no longer than one

For halves and places see `gpu_codes`, for the table of tensors, of which `row` is one, `gpu_kernels`.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
algorithm 4, of which this is a variant that needs one pass.
"""

import triton
import triton.language as tl

from packlight.numerics.gpu_codes import magnitude_bits


@triton.jit
def _vectors(row: tl.tensor, MATRIX: tl.constexpr) -> tl.tuple:
    """Return pointers to row and column maxima, and how many rows and columns there are."""
    rows, columns = tl.load(row + 11).to(tl.pointer_type(tl.float32)), tl.load(row + 12)
    columns = columns.to(tl.pointer_type(tl.float32))
    num_rows, num_columns = tl.load(row + 13), tl.load(row + 14)
    if MATRIX == "strips":
        columns, num_columns = tl.multiple_of(columns, 16), tl.multiple_of(num_columns, 128)
    return rows, columns, num_rows, num_columns


@triton.jit
def load_strip(row: tl.tensor, column: tl.tensor, MATRIX: tl.constexpr) -> tl.tuple:
    """Return a strip's old column maxima and one divided by the last, (64, 1), for low and high half; or zeros."""
    if MATRIX == "strips":
        _, columns, _, num_columns = _vectors(row, MATRIX)
        index = (tl.multiple_of(column, 128) + tl.arange(0, 64))[:, None]
        low, high = tl.load(columns + index), tl.load(columns + index + 64)
        last = columns + num_columns
        low_inverse, high_inverse = tl.div_rn(1.0, tl.load(last + index)), tl.div_rn(1.0, tl.load(last + index + 64))
        strip = low, high, low_inverse, high_inverse
    else:
        strip = 0, 0, 0, 0
    return strip


@triton.jit
def load_maxima(row: tl.tensor, line: tl.tensor, place: tl.tuple, strip: tl.tuple, MATRIX: tl.constexpr) -> tl.tuple:
    """Return what decodes and what encodes each element.

    Args:
        row: of the table of tensors.
        line: int64, (lines,): of the matrix, where MATRIX is "strips".
        place: which elements.
        strip: what `load_strip` gave.
        MATRIX: "" for scales of blocks alone.

    Returns:
        The lesser of old row and column maxima, and the greater of one divided by the last, each for low and
        high half; where MATRIX is "blocks", the row of each line's first element, and row and column of each
        element of the low and of the high half.
    """
    if MATRIX == "":
        result = (line, line), (line, line), line
    elif MATRIX == "strips":
        rows, _, num_rows, _ = _vectors(row, MATRIX)
        old = tl.load(rows + line, line < num_rows, other=1.0)[None, :]
        inverse = tl.div_rn(1.0, tl.load(rows + num_rows + line, line < num_rows, other=1.0))[None, :]
        low, high, low_inverse, high_inverse = strip
        lesser = tl.minimum(old, low), tl.minimum(old, high)
        result = lesser, (tl.maximum(inverse, low_inverse), tl.maximum(inverse, high_inverse)), line
    else:
        start, base, index, _, _, _, _ = place
        _, _, num_rows, num_columns = _vectors(row, MATRIX)
        first = (start + base.to(tl.int64)) // num_columns
        columns = (start + base.to(tl.int64) - first * num_columns)[None, :] + index[:, None]
        low, high = (
            _wrapped(first, columns, num_rows, num_columns),
            _wrapped(first, columns + 64, num_rows, num_columns),
        )
        low_old, low_inverse = _element_maxima(row, low)
        high_old, high_inverse = _element_maxima(row, high)
        result = (low_old, high_old), (low_inverse, high_inverse), (first, low, high)
    return result


@triton.jit
def _wrapped(first: tl.tensor, columns: tl.tensor, num_rows: tl.tensor, num_columns: tl.tensor) -> tl.tuple:
    """Return rows and columns, where columns beyond the last go on in the next row."""
    beyond = columns >= num_columns
    rows = tl.minimum(first[None, :] + beyond.to(tl.int64), num_rows - 1)
    return rows, tl.where(beyond, columns - num_columns, columns)


@triton.jit
def _element_maxima(row: tl.tensor, at: tl.tuple) -> tl.tuple:
    rows, columns, num_rows, num_columns = _vectors(row, "blocks")
    old = tl.minimum(tl.load(rows + at[0]), tl.load(columns + at[1]))
    last = tl.minimum(tl.load(rows + num_rows + at[0]), tl.load(columns + num_columns + at[1]))
    return old, tl.div_rn(1.0, last)


@triton.jit
def gather(
    maxima: tl.tensor,
    row: tl.tensor,
    line: tl.tensor,
    place: tl.tuple,
    roots: tl.tuple,
    found: tl.tuple,
    at: tl.tuple,
    MATRIX: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tuple:
    """Take in the maxima of a tile's roots; `found` are a strip's, and the new ones are returned."""
    low_found, high_found = found
    if MATRIX != "":
        low, high = magnitude_bits(roots[0], place[5], WHOLE), magnitude_bits(roots[1], place[6], WHOLE)
        rows, num_rows = maxima + tl.load(row + 15), tl.load(row + 13)
        if MATRIX == "strips":
            low_found, high_found = tl.maximum(low_found, low), tl.maximum(high_found, high)
            _raise(rows + line, tl.max(tl.maximum(low, high), axis=0), line < num_rows)
        else:
            first, low_at, high_at = at
            low_here, high_here = low_at[0] == first[None, :], high_at[0] == first[None, :]
            here = tl.maximum(tl.where(low_here, low, 0), tl.where(high_here, high, 0))
            beyond = tl.maximum(tl.where(low_here, 0, low), tl.where(high_here, 0, high))
            _raise(rows + first, tl.max(here, axis=0), first < num_rows)
            _raise(rows + first + 1, tl.max(beyond, axis=0), first + 1 < num_rows)
            _raise(rows + num_rows + low_at[1], low, place[5])
            _raise(rows + num_rows + high_at[1], high, place[6])
    return low_found, high_found


@triton.jit
def gather_strip(maxima: tl.tensor, row: tl.tensor, column: tl.tensor, found: tl.tuple) -> None:
    """Take in the column maxima that a strip has found."""
    index = tl.arange(0, 64)
    columns = maxima + tl.load(row + 15) + tl.load(row + 13) + column + index
    _raise(columns, tl.max(found[0], axis=1), index >= 0)
    _raise(columns + 64, tl.max(found[1], axis=1), index >= 0)


@triton.jit
def _raise(pointer: tl.tensor, bits: tl.tensor, mask: tl.tensor) -> None:
    """Raise maxima to these bits; most are reached already, and cost a load."""
    reached = tl.load(pointer, mask, other=0)
    tl.atomic_max(pointer, bits, mask & (bits > reached), sem="relaxed")
