"""The optimiser steps on the CPU: compiled, or the reference where there is no compiler.

The compiled library does all parameters of a call in one parallel region. It takes contiguous fp32 and bf16
parameters; fp16 ones, other strides, and the published formats (paper4bit, factored), which exist to compare
with, go through the reference one by one.

A record per parameter is 16 integers (see `Item` in cpu.cpp); ctypes copies a flat list of them much faster than
it fills structures.
"""

import ctypes
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from packlight.numerics.books import NORMAL_FLOAT, expanded_tables
from packlight.numerics.call import Slot
from packlight.numerics.compiler import CompilerFailed, CompilerMissing, load
from packlight.numerics.formats import MomentFormat
from packlight.numerics.rounding import RoundingName
from packlight.numerics.settings import AdamWNumbers, SGDNumbers

SOURCE = Path(__file__).with_name("cpu.cpp")
DTYPES = (torch.float32, torch.bfloat16)
ROUNDINGS: tuple[RoundingName, ...] = ("nearest", "stochastic", "master24", "master32")
# The fastest way to hand out a few thousand elements is not to.
SERIAL_ELEMENTS = 2**15


class _Tables(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("values", "cells", "expanded", "borders", "limits"))


def adamw_step(slots: Sequence[Slot], numbers: AdamWNumbers, *, stochastic: bool) -> None:
    """Do one AdamW step on many parameters, in place.

    Args:
        slots: the parameters, on the CPU, of any dtypes.
        numbers: the constants of this step.
        stochastic: round second moments at random.
    """
    library = compiled()
    fast = [slot for slot in slots if library is not None and _suits(slot)]
    for batch in _batches(fast):
        assert library is not None
        how, flags = (batch[0].param.dtype == torch.bfloat16, ROUNDINGS.index(batch[0].rounding.name)), stochastic
        library.packlight_adamw_step(*_arguments(batch, numbers), *how, flags, _threads(batch))
    for slot in slots:
        if library is None or not _suits(slot):
            _warn_slow(_slow_reason(slot))
            slot.adamw_step(numbers, stochastic=stochastic)


def sgd_step(slots: Sequence[Slot], numbers: SGDNumbers) -> None:
    """Do one step of SGD with momentum on many parameters, in place.

    Args:
        slots: the parameters, on the CPU, of any dtypes.
        numbers: the constants of this step.
    """
    library = compiled()
    fast = [slot for slot in slots if library is not None and _suits(slot)]
    for batch in _batches(fast):
        assert library is not None
        how = batch[0].param.dtype == torch.bfloat16, ROUNDINGS.index(batch[0].rounding.name)
        library.packlight_sgd_step(*_arguments(batch, numbers), *how, _threads(batch))
    for slot in slots:
        if library is None or not _suits(slot):
            _warn_slow(_slow_reason(slot))
            slot.sgd_step(numbers)


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Return the compiled library, built at its first use; None where it cannot be built, with one warning."""
    try:
        library = load(SOURCE)
    except (CompilerMissing, CompilerFailed) as error:
        warnings.warn(
            f"packlight's CPU kernels could not be compiled, so optimiser steps on low-bit states run in plain "
            f"PyTorch, about 50 times slower. Install a C++ compiler, or set CXX to one. {error}",
            stacklevel=2,
        )
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.packlight_adamw_step.argtypes = [pointer, ctypes.c_int64, pointer, pointer, *[integer] * 4]
    library.packlight_sgd_step.argtypes = [pointer, ctypes.c_int64, pointer, pointer, *[integer] * 3]
    library.packlight_adamw_step.restype = library.packlight_sgd_step.restype = None
    return library


def _slow_reason(slot: Slot) -> str | None:
    """Return what keeps a parameter from the compiled kernels, if its user may not know."""
    if slot.param.dtype not in DTYPES:
        return f"parameters of {slot.param.dtype}"
    if slot.grad.dtype != slot.param.dtype:
        return f"gradients of {slot.grad.dtype} for parameters of {slot.param.dtype}"
    if not slot.param.is_contiguous() or not slot.grad.is_contiguous():
        return "parameters or gradients that are not contiguous (channels_last, transposed or expanded)"
    return None


@functools.cache
def _warn_slow(reason: str | None) -> None:
    """Say once for each reason that steps are slow."""
    if reason is not None and compiled() is not None:
        warnings.warn(
            f"the compiled optimiser step does not take {reason}; these are updated in plain PyTorch, "
            "about 50 times slower. Make them contiguous fp32 or bf16, or leave them to torch.optim.",
            stacklevel=2,
        )


def _suits(slot: Slot) -> bool:
    dense = slot.param.is_contiguous() and slot.grad.is_contiguous() and slot.param.dtype == slot.grad.dtype
    return (
        dense
        and slot.param.dtype in DTYPES
        and bool(slot.moments)
        and all(_kind(moment.format) is not None for moment in slot.moments)
    )


def _kind(moment_format: MomentFormat) -> int | None:
    """Return cpu.cpp's number of a format, None where it has none."""
    book = moment_format.book
    if moment_format.coding == "root" or book is NORMAL_FLOAT:
        four_bits = 2 if moment_format.scale == "matrix" else 1
        return four_bits if moment_format.bits == 4 else 3
    return {"fp32": 0, "softsign": 3, "expanded": 4}.get(moment_format.coding)


def _batches(slots: Sequence[Slot]) -> list[list[Slot]]:
    batches: dict[tuple[torch.dtype, RoundingName], list[Slot]] = {}
    for slot in slots:
        if slot.param.numel():
            batches.setdefault((slot.param.dtype, slot.rounding.name), []).append(slot)
    return list(batches.values())


def _threads(batch: Sequence[Slot]) -> int:
    return 1 if sum(slot.param.numel() for slot in batch) <= SERIAL_ELEMENTS else torch.get_num_threads()


def _arguments(
    batch: Sequence[Slot], numbers: AdamWNumbers | SGDNumbers
) -> tuple[ctypes.Array[ctypes.c_int64], int, ctypes.Array[ctypes.c_float], "ctypes._CArgObject"]:
    fields = [field for slot in batch for field in _fields(slot)]
    items = (ctypes.c_int64 * len(fields))(*fields)
    return items, len(batch), (ctypes.c_float * len(numbers))(*numbers), ctypes.byref(_tables())


def _fields(slot: Slot) -> list[int]:
    last = slot.moments[-1]
    pointers = [slot.param.data_ptr(), slot.grad.data_ptr()]
    pointers.append(0 if slot.rounding.error is None else slot.rounding.error.data_ptr())
    for moment in (*slot.moments, None)[:2]:
        suffixes = ("",) if moment is None or moment.format.coding == "fp32" else ("codes", "scale", "power")
        tensors = {} if moment is None else moment.tensors
        found = [tensors[suffix].data_ptr() if suffix in tensors else 0 for suffix in suffixes]
        pointers += found + [0] * (3 - len(found))
    pointers += [last.tensors[suffix].data_ptr() if suffix in last.tensors else 0 for suffix in ("rows", "cols")]
    columns = last.tensors["cols"].shape[1] if "cols" in last.tensors else 0
    return [*pointers, slot.param.numel(), columns, _kind(last.format) or 0, slot.key, 0]


@functools.cache
def _tables() -> _Tables:
    expanded = expanded_tables(torch.device("cpu"))
    arrays = (ctypes.c_float * 16)(*NORMAL_FLOAT.values), (ctypes.c_int32 * 32)(*NORMAL_FLOAT.cells)
    tables = _Tables(*(ctypes.addressof(array) for array in arrays), *(each.data_ptr() for each in expanded))
    tables.kept = (arrays, expanded)  # the pointers are good for as long as these live
    return tables
