"""What the C++ kernels look up: the tables of `books`, as addresses.

The tables stand once in Python, where the reference reads them too; a copy in C++ could differ. They live as long as
the process, because a plan may be run at any time.
"""

import ctypes
import functools

import torch

from packlight.numerics.books import NORMAL_FLOAT, expanded_tables


class Tables(ctypes.Structure):
    """As in cpu.cpp: pointers."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("values", "cells", "expanded", "borders", "limits"))


@functools.cache
def tables() -> Tables:
    """Return the addresses of the tables."""
    expanded = expanded_tables(torch.device("cpu"))
    arrays = (ctypes.c_float * 16)(*NORMAL_FLOAT.values), (ctypes.c_int32 * 32)(*NORMAL_FLOAT.cells)
    made = Tables(*(ctypes.addressof(array) for array in arrays), *(each.data_ptr() for each in expanded))
    made.kept = (arrays, expanded)  # the pointers are good for as long as these live
    return made
