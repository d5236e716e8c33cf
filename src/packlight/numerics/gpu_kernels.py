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
    vectors[vector]     int64, (5,): 0 address of row or column maxima, 1 their number, 2 where in `maxima` the new
                        ones start, 3 the vector's first program, 4 whether it is columns'

A program does up to TILES tiles, each NUM_ROWS rows of halves (see `gpu_codes`). Where a matrix has whole blocks
in a row (MATRIX "strips"), a program goes down 128 columns, and the columns' maxima stay in registers until it
ends. Other matrices (MATRIX "blocks") go block by block. Both gather the maxima of the new roots in `maxima`,
as the bits of non-negative numbers, which starts as zeros; `rotate_kernel` takes them over when all are done.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
algorithms 1, 2 and 3.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from packlight.numerics import gpu_moments as stored
from packlight.numerics.gpu_codes import float_of, key_at, offsets_of, read_parameter, words, write_parameter
from packlight.numerics.moments import UNKNOWN_COLUMN, UNKNOWN_ROW
from packlight.numerics.noise import PARAMETER_STREAM
from packlight.numerics.second_moments import LARGEST_MAXIMUM, SMALLEST_MAXIMUM

# A tile has four elements of each half for each of 128 threads: then all loads and stores have one layout. The
# interpreter takes as long for a tile of any size.
HALF_ELEMENTS = 8192 if triton.knobs.runtime.interpret else 512
TILES = 8
VECTOR_ELEMENTS = 1024
# What is at a parameter's address. bf16 is moved as 16-bit integers.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.int16, torch.float16: tl.float16}
# No fused multiply-adds and no flushed denormals: results are the reference's.
LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False, "enable_reflect_ftz": False}

_NUM_FIELDS, _NUM_VECTOR_FIELDS = tl.constexpr(16), tl.constexpr(5)
_PARAMETER_STREAM = tl.constexpr(PARAMETER_STREAM)
_SMALLEST_MAXIMUM, _LARGEST_MAXIMUM = tl.constexpr(SMALLEST_MAXIMUM), tl.constexpr(LARGEST_MAXIMUM)
_UNKNOWN_ROW, _UNKNOWN_COLUMN = tl.constexpr(UNKNOWN_ROW), tl.constexpr(UNKNOWN_COLUMN)


@triton.jit
def adamw_kernel(
    tensors: Any, gradients: Any, owners: Any, numbers: Any, step: Any, found_inf: Any, maxima: Any,
    values: Any, borders: Any, limits: Any,
    FIRST: tl.constexpr, SECOND: tl.constexpr, MATRIX: tl.constexpr, TYPE: tl.constexpr, ROUNDING: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNMENT: tl.constexpr, NUM_ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Do one AdamW step on all tensors of a table."""
    if _is_set(found_inf):
        return
    owner = tl.load(owners + tl.program_id(0))
    row = tensors + owner.to(tl.int64) * _NUM_FIELDS
    param, grad, error, numel = _parameter(row, gradients + owner, TYPE, ROUNDING, ALIGNMENT)
    first, second = _moment(row + 5, FIRST, WIDTH, ALIGNMENT), _moment(row + 8, SECOND, WIDTH, ALIGNMENT)
    key, tables = key_at(tl.load(row + 3), tl.load(step)), (values, borders, limits)
    start, column, num_tiles = _tiles(row, numel, MATRIX, NUM_ROWS, WIDTH, TILES)
    beta1, beta2, root_beta2 = tl.load(numbers), tl.load(numbers + 2), tl.load(numbers + 3)
    constants = _adamw_constants(numbers)
    low_bits, high_bits = tl.zeros((NUM_ROWS, WIDTH), tl.int32), tl.zeros((NUM_ROWS, WIDTH), tl.int32)
    for tile in range(0, num_tiles):
        line = start + tile * NUM_ROWS + tl.arange(0, NUM_ROWS)
        place = _place(row, line, column, numel, MATRIX, WIDTH)
        at = stored.matrix_indices(row, line, column, place, MATRIX)
        p, g = _read(param, error, place, ROUNDING), _read(grad, error, place, "nearest")
        m = stored.load_moment(first, place, beta1, tables, FIRST, WIDTH)
        if SECOND == "root":
            old = stored.load_maxima(row, at, MATRIX, False)
            v = stored.load_roots(second, place, root_beta2, old, MATRIX, WIDTH)
            v = (v[0] * v[0], v[1] * v[1])
        else:
            v = stored.load_moment(second, place, beta2, tables, SECOND, WIDTH)
        p_low, m_low, v_low, root_low = _adamw(p[0], g[0], m[0], v[0], constants)
        p_high, m_high, v_high, root_high = _adamw(p[1], g[1], m[1], v[1], constants)
        _write(param, error, place, (p_low, p_high), key, ROUNDING)
        stored.store_first(first, place, (m_low, m_high), tables, FIRST, WIDTH)
        word = words(place, key) if STOCHASTIC else 0
        if SECOND == "root":
            root, new = (root_low, root_high), stored.load_maxima(row, at, MATRIX, True)
            low_bits, high_bits = stored.gather(maxima, row, at, place, root, (low_bits, high_bits), MATRIX)
            stored.store_roots(second, place, root, new, word, MATRIX, WIDTH, STOCHASTIC)
        else:
            stored.store_second(second, place, (v_low, v_high), word, tables, SECOND, STOCHASTIC)
    if MATRIX == "strips":
        stored.gather_columns(maxima, row, column, (low_bits, high_bits), WIDTH)


@triton.jit
def sgd_kernel(
    tensors: Any, gradients: Any, owners: Any, numbers: Any, step: Any, found_inf: Any,
    values: Any, borders: Any, limits: Any,
    FIRST: tl.constexpr, TYPE: tl.constexpr, ROUNDING: tl.constexpr, ALIGNMENT: tl.constexpr, NUM_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Do one step of SGD with momentum on all tensors of a table."""
    if _is_set(found_inf):
        return
    owner = tl.load(owners + tl.program_id(0))
    row = tensors + owner.to(tl.int64) * _NUM_FIELDS
    param, grad, error, numel = _parameter(row, gradients + owner, TYPE, ROUNDING, ALIGNMENT)
    first = _moment(row + 5, FIRST, WIDTH, ALIGNMENT)
    key, tables = key_at(tl.load(row + 3), tl.load(step)), (values, borders, limits)
    start, column, num_tiles = _tiles(row, numel, "", NUM_ROWS, WIDTH, TILES)
    momentum, constants = tl.load(numbers), _sgd_constants(numbers)
    for tile in range(0, num_tiles):
        line = start + tile * NUM_ROWS + tl.arange(0, NUM_ROWS)
        place = _place(row, line, column, numel, "", WIDTH)
        p, g = _read(param, error, place, ROUNDING), _read(grad, error, place, "nearest")
        if FIRST == "":
            m = g
        else:
            m = stored.load_moment(first, place, momentum, tables, FIRST, WIDTH)
        p_low, m_low = _sgd(p[0], g[0], m[0], constants, FIRST)
        p_high, m_high = _sgd(p[1], g[1], m[1], constants, FIRST)
        _write(param, error, place, (p_low, p_high), key, ROUNDING)
        if FIRST != "":
            stored.store_first(first, place, (m_low, m_high), tables, FIRST, WIDTH)


@triton.jit
def rotate_kernel(vectors: Any, owners: Any, maxima: Any, found_inf: Any, SIZE: tl.constexpr) -> None:
    """Keep the row and column maxima that were used for encoding, and take over the new ones."""
    if _is_set(found_inf):
        return
    vector = vectors + tl.load(owners + tl.program_id(0)).to(tl.int64) * _NUM_VECTOR_FIELDS
    length, begin = tl.load(vector + 1), tl.load(vector + 2)
    stored_maxima = tl.load(vector).to(tl.pointer_type(tl.float32))
    index = (tl.program_id(0) - tl.load(vector + 3)) * SIZE + tl.arange(0, SIZE)
    used = tl.load(stored_maxima + length + index, index < length, other=0.0)
    new = float_of(tl.load(maxima + begin + index, index < length, other=0))
    otherwise = tl.where(tl.load(vector + 4) != 0, _UNKNOWN_COLUMN, _UNKNOWN_ROW)
    new = tl.where((new >= _SMALLEST_MAXIMUM) & (new <= _LARGEST_MAXIMUM), new, otherwise)
    tl.store(stored_maxima + index, used, index < length)
    tl.store(stored_maxima + length + index, new, index < length)


# The lines of `reference.adamw_step` and `reference.sgd_step`, for one half


@triton.jit
def _adamw_constants(numbers: Any) -> Any:
    gradient_to_m, gradient_to_root, decay = tl.load(numbers + 1), tl.load(numbers + 4), tl.load(numbers + 5)
    root_to_denom, denom_eps = tl.load(numbers + 6), tl.load(numbers + 7)
    return gradient_to_m, gradient_to_root, decay, root_to_denom, denom_eps, tl.load(numbers + 8), tl.load(numbers + 9)


@triton.jit
def _adamw(p: Any, g: Any, m: Any, v: Any, constants: Any) -> Any:
    """Return the new p, m, v and its root; m and v come decayed. Legend: as in the reference."""
    gradient_to_m, gradient_to_root, decay, root_to_denom, denom_eps, coefficient, l2 = constants
    g = tl.where(l2 != 0, g * coefficient + p * l2, g)
    m = m + g * gradient_to_m
    g = g * gradient_to_root
    v = v + g * g
    root = tl.sqrt_rn(v)
    p = p * decay - tl.div_rn(m, root * root_to_denom + denom_eps)
    return p, m, v, root


@triton.jit
def _sgd_constants(numbers: Any) -> Any:
    gradient_to_m, m_to_p, gradient_to_p = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    return gradient_to_m, m_to_p, gradient_to_p, tl.load(numbers + 4), tl.load(numbers + 5)


@triton.jit
def _sgd(p: Any, g: Any, m: Any, constants: Any, FIRST: tl.constexpr) -> Any:
    """Return the new p and m; m comes decayed, and is not looked at without momentum. Legend: as in the reference."""
    gradient_to_m, m_to_p, gradient_to_p, coefficient, l2 = constants
    g = g * coefficient
    g = tl.where(l2 != 0, g + p * l2, g)
    m = g if FIRST == "" else m + g * gradient_to_m
    change = m * m_to_p
    change = tl.where(gradient_to_p != 0, change + g * gradient_to_p, change)
    return p - change, m


# Finding the tensor, and a tile in it


@triton.jit
def _is_set(found_inf: Any) -> Any:
    if found_inf is None:
        is_set = False
    else:
        is_set = tl.load(found_inf) != 0
    return is_set


@triton.jit
def _pointer(address: Any, TYPE: tl.constexpr, ALIGNMENT: tl.constexpr) -> Any:
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(TYPE)), ALIGNMENT)


@triton.jit
def _parameter(
    row: Any, gradient: Any, TYPE: tl.constexpr, ROUNDING: tl.constexpr, ALIGNMENT: tl.constexpr
) -> Any:
    """Return pointers to parameter, gradient and error bits, and the number of elements."""
    error = _pointer(row + 1, tl.int8 if ROUNDING == "master24" else tl.int16, ALIGNMENT)
    numel = tl.multiple_of(tl.load(row + 2), ALIGNMENT)
    return _pointer(row, TYPE, ALIGNMENT), _pointer(gradient, TYPE, ALIGNMENT), error, numel


@triton.jit
def _moment(row: Any, CODING: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr) -> Any:
    """Return the pointers of a moment: codes (or values), scales and powers."""
    if CODING == "fp32":
        codes = _pointer(row, tl.float32, ALIGNMENT)
    else:
        codes = _pointer(row, tl.int8 if CODING == "softsign" else tl.uint8, ALIGNMENT)
    scale = _pointer(row + 1, tl.float32 if WIDTH == 64 else tl.int16, ALIGNMENT)
    return codes, scale, _pointer(row + 2, tl.uint8, ALIGNMENT)


@triton.jit
def _tiles(
    row: Any, numel: Any, MATRIX: tl.constexpr, NUM_ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr
) -> Any:
    """Return the first line (row of halves, or of the matrix) of this program, its first column and its tiles."""
    program = tl.program_id(0) - tl.load(row + 4)
    if MATRIX == "strips":
        num_strips = tl.load(row + 14) >> 7
        start, column = program // num_strips * (NUM_ROWS * TILES), program % num_strips * 128
        num_lines = tl.load(row + 13)
    else:
        start, column = program * (NUM_ROWS * TILES), program * 0
        num_lines = ((numel + 127) >> 7) * (64 // WIDTH)
    return start, column, tl.minimum(tl.cdiv(num_lines - start, NUM_ROWS), TILES).to(tl.int32)


@triton.jit
def _place(row: Any, line: Any, column: Any, numel: Any, MATRIX: tl.constexpr, WIDTH: tl.constexpr) -> Any:
    """Return where the low half of a tile is: its rows' offsets, a row's elements, and the number of elements."""
    if MATRIX == "strips":
        base = line * tl.multiple_of(tl.load(row + 14), 128) + tl.multiple_of(column, 128)
    elif WIDTH == 64:
        base = line * 128
    else:
        base = (line >> 1) * 128 + (line & 1) * 32
    return base, tl.arange(0, WIDTH), numel


@triton.jit
def _read(pointer: Any, error: Any, place: Any, ROUNDING: tl.constexpr) -> Any:
    offset, low_mask, high_mask = offsets_of(place)
    low = read_parameter(pointer, error, offset, low_mask, ROUNDING)
    return low, read_parameter(pointer, error, offset + 64, high_mask, ROUNDING)


@triton.jit
def _write(param: Any, error: Any, place: Any, halves: Any, key: Any, ROUNDING: tl.constexpr) -> None:
    offset, low_mask, high_mask = offsets_of(place)
    if ROUNDING == "stochastic":
        word = words(place, key ^ _PARAMETER_STREAM)
        low, high = (word >> 16).to(tl.int32), (word & 0xFFFF).to(tl.int32)
    else:
        low, high = 0, 0
    write_parameter(param, error, offset, low_mask, halves[0], low, ROUNDING)
    write_parameter(param, error, offset + 64, high_mask, halves[1], high, ROUNDING)
