"""The optimiser steps as Triton kernels: one launch does all tensors that are stored alike.

A launch per tensor costs more than the step itself for models of many small tensors, and PyTorch's own
multi-tensor functions know only its dtypes. Here a program finds its tensor in a table in device memory, and
constants, step number and found_inf are read there too: nothing waits for the host.

    owners[program]     which tensor a program works on, int32
    tensors[tensor]     int64, (16,): 0 address of the parameter, 1 of its error bits; 2 elements; 3 seed; 4 its first
                        program; 5, 6, 7 addresses of exp_avg's codes (or values), scales, powers; 8, 9, 10 of
                        exp_avg_sq's; of a matrix: 11, 12 addresses of row and column maxima, 13, 14 numbers of rows
                        and columns, 15 where in `maxima` its new row maxima start; its column maxima follow
    gradients[tensor]   the gradient's address, int64; apart, because it changes when gradients are freed
    vectors[program]    int64, (4,): 0 address of row or column maxima, 1 their number, 2 where in `maxima` the new
                        ones start, 3 whether they are columns' (1) and are only to be left there (2)

A program is one warp, so that it never waits for another, and does up to TILES tiles one after the other. A tile
is LINES lines of both halves (see `gpu_codes`): a line is half a block, or in a strip (see `gpu_matrices`) the
half of a row's 128 columns. New row and column maxima are gathered in `maxima`, which starts as zeros;
`rotate_kernel` takes them over when all tensors are done.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
algorithms 1, 2 and 3.
"""

import torch
import triton
import triton.language as tl

from packlight.numerics import gpu_matrices as matrices
from packlight.numerics import gpu_moments as stored
from packlight.numerics.gpu_codes import float_of, key_at, offsets_of, read_parameter, words, write_parameter
from packlight.numerics.moments import UNKNOWN_COLUMN, UNKNOWN_ROW
from packlight.numerics.noise import PARAMETER_STREAM
from packlight.numerics.second_moments import LARGEST_MAXIMUM, MAXIMA_RANGE, MAXIMA_SLACK, SMALLEST_MAXIMUM

# Of a tile: four elements of each half a thread, so that all loads and stores have one layout. The interpreter
# takes as long for a tile of any size.
HALF_ELEMENTS = 8192 if triton.knobs.runtime.interpret else 128
# So a strip is 64 rows, and a column's maximum costs one atomic operation for as many elements.
TILES = 32
VECTOR_ELEMENTS = 4096
# What is at a parameter's address. bf16 is moved as 16-bit integers.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.int16, torch.float16: tl.float16}
# No fused multiply-adds and no flushed denormals: results are the reference's.
LAUNCH_OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False, "enable_reflect_ftz": False}
VECTOR_LAUNCH_OPTIONS = {"num_warps": 8, "num_stages": 1}

_NUM_FIELDS, _NUM_VECTOR_FIELDS = tl.constexpr(16), tl.constexpr(4)
_PARAMETER_STREAM = tl.constexpr(PARAMETER_STREAM)
_SMALLEST_MAXIMUM, _LARGEST_MAXIMUM = tl.constexpr(SMALLEST_MAXIMUM), tl.constexpr(LARGEST_MAXIMUM)
_MAXIMA_RANGE, _MAXIMA_SLACK = tl.constexpr(MAXIMA_RANGE), tl.constexpr(MAXIMA_SLACK)
_UNKNOWN_ROW, _UNKNOWN_COLUMN = tl.constexpr(UNKNOWN_ROW), tl.constexpr(UNKNOWN_COLUMN)


@triton.jit
def adamw_kernel(
    tensors: tl.tensor,
    gradients: tl.tensor,
    owners: tl.tensor,
    numbers: tl.tensor,
    step: tl.tensor,
    found_inf: tl.tensor,
    maxima: tl.tensor,
    values: tl.tensor,
    borders: tl.tensor,
    limits: tl.tensor,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    MATRIX: tl.constexpr,
    TYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Do one AdamW step on all tensors of a table; what is written in capitals, `gpu_tables.Kind` explains."""
    if _is_set(found_inf):
        return
    owner = tl.load(owners + tl.program_id(0))
    row = tensors + owner.to(tl.int64) * _NUM_FIELDS
    param, grad, error = _parameter(row, gradients + owner, TYPE, ROUNDING, ALIGNMENT)
    first, second = _moment(row + 5, FIRST, WIDTH, ALIGNMENT), _moment(row + 8, SECOND, WIDTH, ALIGNMENT)
    seed, tables = tl.load(row + 3), (values, borders, limits)
    key, shift = key_at(seed, tl.load(step)), (seed >> 32).to(tl.uint32)
    beta1, beta2, root_beta2 = tl.load(numbers), tl.load(numbers + 2), tl.load(numbers + 3)
    constants = _adamw_constants(numbers)
    line, column, num_tiles = _tiles(row, MATRIX, LINES, WIDTH, TILES)
    strip = matrices.load_strip(row, column, MATRIX)
    low_found, high_found = tl.zeros((WIDTH, LINES), tl.int32), tl.zeros((WIDTH, LINES), tl.int32)
    for tile in range(0, num_tiles):
        place = _place(row, line + tile * LINES, column, MATRIX, LINES, WIDTH, WHOLE)
        p, g = _read(param, error, place, ROUNDING), _read(grad, error, place, "nearest")
        m = stored.load_moment(first, place, beta1, tables, FIRST, WIDTH)
        if SECOND == "root":
            lines = line + tile * LINES + tl.arange(0, LINES)
            old, last, at = matrices.load_maxima(row, lines, place, strip, MATRIX)
            v = stored.load_roots(second, place, root_beta2, old, MATRIX, WIDTH)
            v = (v[0] * v[0], v[1] * v[1])
        else:
            v = stored.load_moment(second, place, beta2, tables, SECOND, WIDTH)
        p_low, m_low, v_low, root_low = _adamw(p[0], g[0], m[0], v[0], constants)
        p_high, m_high, v_high, root_high = _adamw(p[1], g[1], m[1], v[1], constants)
        _write(param, error, place, (p_low, p_high), key, shift, ROUNDING)
        stored.store_first(first, place, (m_low, m_high), tables, FIRST, WIDTH, WHOLE)
        word = words(place, key, shift) if STOCHASTIC else 0
        if SECOND == "root":
            root, found = (root_low, root_high), (low_found, high_found)
            low_found, high_found = matrices.gather(maxima, row, lines, place, root, found, at, MATRIX, WHOLE)
            if MATRIX != "":
                root = (root_low * last[0], root_high * last[1])
            stored.store_roots(second, place, root, word, WIDTH, STOCHASTIC, WHOLE)
        else:
            stored.store_second(second, place, (v_low, v_high), word, tables, SECOND, STOCHASTIC, WHOLE)
    if MATRIX == "strips":
        matrices.gather_strip(maxima, row, column, (low_found, high_found))


@triton.jit
def sgd_kernel(
    tensors: tl.tensor,
    gradients: tl.tensor,
    owners: tl.tensor,
    numbers: tl.tensor,
    step: tl.tensor,
    found_inf: tl.tensor,
    values: tl.tensor,
    borders: tl.tensor,
    limits: tl.tensor,
    FIRST: tl.constexpr,
    TYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Do one step of SGD on all tensors of a table; FIRST is "" without momentum."""
    if _is_set(found_inf):
        return
    owner = tl.load(owners + tl.program_id(0))
    row = tensors + owner.to(tl.int64) * _NUM_FIELDS
    param, grad, error = _parameter(row, gradients + owner, TYPE, ROUNDING, ALIGNMENT)
    first = _moment(row + 5, FIRST, WIDTH, ALIGNMENT)
    seed, tables = tl.load(row + 3), (values, borders, limits)
    key, shift = key_at(seed, tl.load(step)), (seed >> 32).to(tl.uint32)
    momentum, constants = tl.load(numbers), _sgd_constants(numbers)
    line, column, num_tiles = _tiles(row, "", LINES, WIDTH, TILES)
    for tile in range(0, num_tiles):
        place = _place(row, line + tile * LINES, column, "", LINES, WIDTH, WHOLE)
        p, g = _read(param, error, place, ROUNDING), _read(grad, error, place, "nearest")
        if FIRST == "":
            m = g
        else:
            m = stored.load_moment(first, place, momentum, tables, FIRST, WIDTH)
        p_low, m_low = _sgd(p[0], g[0], m[0], constants, FIRST)
        p_high, m_high = _sgd(p[1], g[1], m[1], constants, FIRST)
        _write(param, error, place, (p_low, p_high), key, shift, ROUNDING)
        if FIRST != "":
            stored.store_first(first, place, (m_low, m_high), tables, FIRST, WIDTH, WHOLE)


@triton.jit
def rotate_kernel(vectors: tl.tensor, maxima: tl.tensor, found_inf: tl.tensor, SIZE: tl.constexpr) -> None:
    """Keep the divisors of this step for decoding, and take over maxima that have moved; a vector a program."""
    if _is_set(found_inf):
        return
    vector = vectors + tl.program_id(0) * _NUM_VECTOR_FIELDS
    pointer, length = tl.load(vector).to(tl.pointer_type(tl.float32)), tl.load(vector + 1)
    maxima += tl.load(vector + 2)
    kind = tl.load(vector + 3)
    unknown, deferred = tl.where((kind & 1) != 0, _UNKNOWN_COLUMN, _UNKNOWN_ROW), (kind & 2) != 0
    num_parts = tl.cdiv(length, SIZE).to(tl.int32)
    largest = tl.zeros((SIZE,), tl.float32)
    for part in range(0, num_parts):
        index = part * SIZE + tl.arange(0, SIZE)
        new = float_of(tl.load(maxima + index, index < length, other=0))
        largest = tl.maximum(largest, tl.where(_usable(new), new, 0.0))
    least = tl.max(largest, axis=0) * (1 / _MAXIMA_RANGE)
    for part in range(0, num_parts):
        index = part * SIZE + tl.arange(0, SIZE)
        last = tl.load(pointer + length + index, index < length, other=0.0)
        new = float_of(tl.load(maxima + index, index < length, other=0))
        tl.store(pointer + index, tl.where(deferred, new, last), index < length)
        following = tl.where(_usable(new), tl.maximum(new, least), unknown)
        changed = (following > last * _MAXIMA_SLACK) | (last > following * _MAXIMA_SLACK)
        tl.store(pointer + length + index, tl.where(changed & (not deferred), following, last), index < length)


@triton.jit
def _usable(maxima: tl.tensor) -> tl.tensor:
    return (maxima >= _SMALLEST_MAXIMUM) & (maxima <= _LARGEST_MAXIMUM)


# The lines of `reference.adamw_step` and `reference.sgd_step`, for one half


@triton.jit
def _adamw_constants(numbers: tl.tensor) -> tl.tuple:
    gradient_to_m, gradient_to_root, decay = tl.load(numbers + 1), tl.load(numbers + 4), tl.load(numbers + 5)
    root_to_denom, denom_eps = tl.load(numbers + 6), tl.load(numbers + 7)
    return gradient_to_m, gradient_to_root, decay, root_to_denom, denom_eps, tl.load(numbers + 8), tl.load(numbers + 9)


@triton.jit
def _adamw(p: tl.tensor, g: tl.tensor, m: tl.tensor, v: tl.tensor, constants: tl.tuple) -> tl.tuple:
    """Return the new p, m, v and its root; m and v come decayed. Legend: as in the reference."""
    gradient_to_m, gradient_to_root, decay, root_to_denom, denom_eps, coefficient, l2 = constants
    if l2 != 0:
        g = g * coefficient + p * l2
    m = m + g * gradient_to_m
    g = g * gradient_to_root
    v = v + g * g
    root = tl.sqrt_rn(v)
    p = p * decay - tl.div_rn(m, root * root_to_denom + denom_eps)
    return p, m, v, root


@triton.jit
def _sgd_constants(numbers: tl.tensor) -> tl.tuple:
    gradient_to_m, m_to_p, gradient_to_p = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    return gradient_to_m, m_to_p, gradient_to_p, tl.load(numbers + 4), tl.load(numbers + 5)


@triton.jit
def _sgd(p: tl.tensor, g: tl.tensor, m: tl.tensor, constants: tl.tuple, FIRST: tl.constexpr) -> tl.tuple:
    """Return the new p and m; m comes decayed, and without momentum is the gradient. Legend: as in the reference."""
    gradient_to_m, m_to_p, gradient_to_p, coefficient, l2 = constants
    g = g * coefficient
    if l2 != 0:
        g = g + p * l2
    m = g if FIRST == "" else m + g * gradient_to_m
    change = m * m_to_p
    if gradient_to_p != 0:
        change = change + g * gradient_to_p
    return p - change, m


# Finding the tensor, and a tile in it


@triton.jit
def _is_set(found_inf: tl.tensor) -> tl.tensor:
    if found_inf is None:
        is_set = False
    else:
        is_set = tl.load(found_inf) != 0
    return is_set


@triton.jit
def _pointer(address: tl.tensor, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr) -> tl.tensor:
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(TYPE)), ALIGNMENT)


@triton.jit
def _parameter(
    row: tl.tensor, gradient: tl.tensor, TYPE: tl.constexpr, ROUNDING: tl.constexpr, ALIGNMENT: tl.constexpr
) -> tl.tuple:
    """Return pointers to parameter, gradient and error bits."""
    error = _pointer(row + 1, tl.int8 if ROUNDING == "master24" else tl.int16, ALIGNMENT)
    return _pointer(row, TYPE, ALIGNMENT), _pointer(gradient, TYPE, ALIGNMENT), error


@triton.jit
def _moment(row: tl.tensor, CODING: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr) -> tl.tuple:
    """Return the pointers of a moment: codes (or values), scales and powers."""
    if CODING == "fp32":
        codes = _pointer(row, tl.float32, ALIGNMENT)
    else:
        codes = _pointer(row, tl.int8 if CODING == "softsign" else tl.uint8, ALIGNMENT)
    scale = _pointer(row + 1, tl.float32 if WIDTH == 64 else tl.int16, ALIGNMENT)
    return codes, scale, _pointer(row + 2, tl.uint8, ALIGNMENT)


@triton.jit
def _tiles(
    row: tl.tensor, MATRIX: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr
) -> tl.tuple:
    """Return a program's first line (of half blocks, or of the matrix), first column and number of tiles."""
    program = tl.program_id(0) - tl.load(row + 4)
    if MATRIX == "strips":
        num_strips, num_lines = tl.load(row + 14) >> 7, tl.load(row + 13)
        line, column = program // num_strips * (LINES * TILES), program % num_strips * 128
    else:
        num_lines = ((tl.load(row + 2) + 127) >> 7) * (64 // WIDTH)
        line, column = program * (LINES * TILES), program * 0
    return line, column, tl.minimum(tl.cdiv(num_lines - line, LINES), TILES).to(tl.int32)


@triton.jit
def _place(
    row: tl.tensor,
    line: tl.tensor,
    column: tl.tensor,
    MATRIX: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tuple:
    """Return the place of a tile, see `gpu_codes`."""
    lines, index = tl.arange(0, LINES), tl.arange(0, WIDTH)
    if MATRIX == "strips":
        num_columns = tl.multiple_of(tl.load(row + 14), 128)
        start, base = line * num_columns + tl.multiple_of(column, 128), lines * num_columns.to(tl.int32)
    elif WIDTH == 64:
        start, base = line * 128, lines * 128
    else:
        start, base = (line >> 1) * 128, (lines >> 1) * 128 + (lines & 1) * 32
    left = tl.minimum(tl.load(row + 2) - start, 2**30).to(tl.int32)
    low_lines, high_lines = base < left, base + 64 < left
    if WHOLE:
        low_mask, high_mask = low_lines[None, :], low_lines[None, :]
    else:
        offset = base[None, :] + index[:, None]
        low_mask, high_mask = offset < left, offset + 64 < left
    return start, base, index, low_lines, high_lines, low_mask, high_mask


@triton.jit
def _read(pointer: tl.tensor, error: tl.tensor, place: tl.tuple, ROUNDING: tl.constexpr) -> tl.tuple:
    start, offset, low_mask, high_mask = place[0], offsets_of(place), place[5], place[6]
    low = read_parameter(pointer + start, error + start, offset, low_mask, ROUNDING)
    return low, read_parameter(pointer + start, error + start, offset + 64, high_mask, ROUNDING)


@triton.jit
def _write(
    param: tl.tensor,
    error: tl.tensor,
    place: tl.tuple,
    halves: tl.tuple,
    key: tl.tensor,
    shift: tl.tensor,
    ROUNDING: tl.constexpr,
) -> None:
    start, offset, low_mask, high_mask = place[0], offsets_of(place), place[5], place[6]
    if ROUNDING == "stochastic":
        word = words(place, key ^ _PARAMETER_STREAM, shift)
        low, high = (word >> 16).to(tl.int32), (word & 0xFFFF).to(tl.int32)
    else:
        low, high = 0, 0
    write_parameter(param + start, error + start, offset, low_mask, halves[0], low, ROUNDING)
    write_parameter(param + start, error + start, offset + 64, high_mask, halves[1], high, ROUNDING)
