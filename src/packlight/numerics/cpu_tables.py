"""What the C++ kernels look up: the tables of `books`, as addresses.

The tables stand once in Python, where the reference reads them too; a copy in C++ could differ. They live as long as
the process, because a plan may be run at any time.

What an FP8 code's ratio is compared with depends on the block's power, so no formula finds it. A ratio's cell does:
how far its bits are below those of 1, shifted so that 1024 cells hold the whole range and none holds two borders.
"""

import ctypes
import functools
from typing import TypeAlias

import torch
from torch import Tensor

from packlight.numerics.books import NORMAL_FLOAT, expanded_tables

# As in cpu.cpp. A kernel reads four bytes to have one.
NUM_CELLS, SPARE_BYTES = 1024, 4
ONE_BITS = 0x3F800000

Array: TypeAlias = "ctypes.Array[ctypes.c_uint8] | ctypes.Array[ctypes.c_int32]"


class Tables(ctypes.Structure):
    """As in cpu.cpp: pointers."""

    _names = ("values", "cells", "expanded", "borders", "limits", "cells_of_borders", "cells_of_values", "shifts")
    _fields_ = tuple((name, ctypes.c_void_p) for name in _names)


@functools.cache
def tables() -> Tables:
    """Return the addresses of the tables."""
    expanded = expanded_tables(torch.device("cpu"))
    arrays = (ctypes.c_float * 16)(*NORMAL_FLOAT.values), (ctypes.c_int32 * 32)(*NORMAL_FLOAT.cells)
    cells = expanded_cells(*expanded[:2])
    made = Tables(
        *(ctypes.addressof(array) for array in arrays),
        *(tensor.data_ptr() for tensor in expanded),
        *(ctypes.addressof(array) for array in cells),
    )
    made.kept = (arrays, expanded, cells)  # the pointers are good for as long as these live
    return made


def expanded_cells(values: Tensor, borders: Tensor) -> tuple[Array, Array, Array]:
    """Return what finds FP8 codes.

    Args:
        values: fp32, (256, 128): see `books.expanded_tables`.
        borders: fp32, (256, 128): see there.

    Returns:
        For each power and cell, how many borders are below all of the cell; the same for values, up to it; for each
        power, the shift.
    """
    spans = ONE_BITS - borders[:, 0].view(torch.int32)
    shifts = torch.stack([spans >> shift >= NUM_CELLS - 1 for shift in range(31)]).sum(0, dtype=torch.int32)
    nearest = ONE_BITS - (torch.arange(NUM_CELLS, dtype=torch.int32) << shifts[:, None])
    farthest = nearest - (1 << shifts[:, None]) + 1
    farthest[:, -1] = 0  # the last one has the rest
    ends = [bits.clamp(min=0).view(torch.float32) for bits in (farthest, nearest)]
    below_borders = _counts(borders[:, :126].contiguous(), ends, right=False)
    return below_borders, _counts(values[:, 1:127].contiguous(), ends, right=True), (ctypes.c_int32 * 256)(*shifts)


def _counts(edges: Tensor, ends: list[Tensor], *, right: bool) -> Array:
    below, up_to = (torch.searchsorted(edges, end, right=right) for end in ends)
    assert int((up_to - below).max()) <= 1, "a cell holds two borders"
    return (ctypes.c_uint8 * (below.numel() + SPARE_BYTES)).from_buffer_copy(
        bytes(below.view(-1).tolist()) + bytes(SPARE_BYTES)
    )
