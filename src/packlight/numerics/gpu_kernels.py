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

import triton
import triton.language as tl

from packlight.numerics import gpu_moments as stored
from packlight.numerics.gpu_codes import float_of, key_at, load, offsets_of, read_parameter, words, write_parameter
from packlight.numerics.moments import UNKNOWN_COLUMN, UNKNOWN_ROW
from packlight.numerics.noise import PARAMETER_STREAM
from packlight.numerics.second_moments import LARGEST_MAXIMUM, SMALLEST_MAXIMUM

NUM_FIELDS, NUM_VECTOR_FIELDS = 16, 5
# A tile has four elements of each half for each of 128 threads: then all loads and stores have one layout. The
# interpreter takes as long for a tile of any size.
HALF_ELEMENTS = 8192 if triton.knobs.runtime.interpret else 512
TILES = 8
VECTOR_ELEMENTS = 1024
# No fused multiply-adds and no flushed denormals: results are the reference's.
LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False, "enable_reflect_ftz": False}

_NUM_FIELDS, _NUM_VECTOR_FIELDS = tl.constexpr(NUM_FIELDS), tl.constexpr(NUM_VECTOR_FIELDS)
_PARAMETER_STREAM = tl.constexpr(PARAMETER_STREAM)
_SMALLEST_MAXIMUM, _LARGEST_MAXIMUM = tl.constexpr(SMALLEST_MAXIMUM), tl.constexpr(LARGEST_MAXIMUM)
_UNKNOWN_ROW, _UNKNOWN_COLUMN = tl.constexpr(UNKNOWN_ROW), tl.constexpr(UNKNOWN_COLUMN)


@triton.jit
def adamw_kernel(
    tensors: Any, gradients: Any, owners: Any, numbers: Any, step: Any, found_inf: Any, maxima: Any, tables: Any,
    FIRST: tl.constexpr, SECOND: tl.constexpr, MATRIX: tl.constexpr, TYPE: tl.constexpr, ROUNDING: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNMENT: tl.constexpr, NUM_ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Do one AdamW step: the lines of `reference.adamw_step`, in its order."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    owner = tl.load(owners + tl.program_id(0))
    row = tensors + owner.to(tl.int64) * _NUM_FIELDS
    param, grad, error, numel = _parameter(row, gradients + owner, TYPE, ROUNDING, ALIGNMENT)
    first = _moment(row + 5, FIRST, WIDTH, ALIGNMENT)
    second = _moment(row + 8, SECOND, WIDTH, ALIGNMENT)
    key = key_at(tl.load(row + 3), tl.load(step))
    start, num_tiles = _tiles(row, numel, MATRIX, NUM_ROWS, WIDTH, TILES)
    beta1, gradient_to_m = tl.load(numbers), tl.load(numbers + 1)
    beta2, root_beta2, gradient_to_root = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    decay, root_to_denom, denom_eps = tl.load(numbers + 5), tl.load(numbers + 6), tl.load(numbers + 7)
    coefficient, l2 = tl.load(numbers + 8), tl.load(numbers + 9)
    column_maxima = tl.zeros((NUM_ROWS, WIDTH), tl.int32), tl.zeros((NUM_ROWS, WIDTH), tl.int32)
    for tile in range(0, num_tiles):
        ...
