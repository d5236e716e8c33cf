"""The optimiser steps on the CPU: compiled, or the reference where there is no compiler.

The compiled library does all parameters of a call in one parallel region. It takes contiguous fp32 and bf16
parameters; fp16 ones, other strides, and the published formats (paper4bit, factored), which exist to compare
with, go through the reference one by one.

A record per parameter is 16 integers (see `Item` in cpu.cpp). Records are made at the first step and found again by
the addresses in them.
"""

import ctypes
import functools
import warnings
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from packlight.numerics.books import NORMAL_FLOAT, expanded_tables
from packlight.numerics.call import Call, Slot
from packlight.numerics.compiler import CompilerFailed, CompilerMissing, load
from packlight.numerics.formats import MomentFormat
from packlight.numerics.noise import key_at
from packlight.numerics.rounding import RoundingName
from packlight.numerics.settings import AdamWNumbers, SGDNumbers

SOURCE = Path(__file__).with_name("cpu.cpp")
DTYPES = (torch.float32, torch.bfloat16)
ROUNDINGS: tuple[RoundingName, ...] = ("nearest", "stochastic", "master24", "master32")
# The fastest way to hand out a few thousand elements is not to.
SERIAL_ELEMENTS = 2**15
# Addresses that keep changing would fill the memory with plans: 128 bytes a record.
MAX_ITEMS = 2**16
# Of an item: what a plan that is found again has not.
NUM_FIELDS, GRAD_FIELD, KEY_FIELD = 16, 1, 14


class Batch(NamedTuple):
    """Parameters of one dtype and rounding that one call of the library does.

    Attributes:
        members: their places among the parameters that came.
        items: 16 integers a member: `Item` in cpu.cpp.
        is_bf16: whether they are bf16; fp32 otherwise.
        rounding: index in ROUNDINGS.
        num_elements: of all of them.
    """

    members: tuple[int, ...]
    items: "array[int]"
    is_bf16: bool
    rounding: int
    num_elements: int

    def with_fields(self, fields: Mapping[int, list[int]]) -> "Batch":
        """Return a copy with other values in some fields: another thread may be reading this one's."""
        items = self.items[:]
        for field, values in fields.items():
            items[field::NUM_FIELDS] = array("q", values)
        return self._replace(items=items)

    def adamw_step(self, library: ctypes.CDLL, numbers: AdamWNumbers, *, stochastic: bool) -> None:
        """Do one AdamW step."""
        flags = self.is_bf16, self.rounding, stochastic, self._threads()
        library.packlight_adamw_step(*self._arguments(numbers), *flags)

    def sgd_step(self, library: ctypes.CDLL, numbers: SGDNumbers) -> None:
        """Do one step of SGD."""
        library.packlight_sgd_step(*self._arguments(numbers), self.is_bf16, self.rounding, self._threads())

    def _threads(self) -> int:
        return 1 if self.num_elements <= SERIAL_ELEMENTS else torch.get_num_threads()

    def _arguments(
        self, numbers: AdamWNumbers | SGDNumbers
    ) -> tuple[int, int, ctypes.Array[ctypes.c_float], "ctypes._CArgObject"]:
        return (
            self.items.buffer_info()[0],
            len(self.members),
            (ctypes.c_float * len(numbers))(*numbers),
            ctypes.byref(_tables()),
        )


class Plan(NamedTuple):
    """How parameters are done: batches of them by the library, the others by the reference."""

    batches: tuple[Batch, ...]
    others: tuple[int, ...]

    @property
    def num_items(self) -> int:
        """Return how many records it has, at least 1."""
        return 1 + sum(len(batch.members) for batch in self.batches)


class _Tables(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("values", "cells", "expanded", "borders", "limits"))


_plans: dict[tuple[object, ...], Plan] = {}


def plan_of(call: Call, *, num_moments: int) -> Plan:
    """Return how a call's parameters are done, with the addresses of its gradients and the keys of its step.

    What was checked and found out once is kept under the addresses of parameters and states, as torch's own bookkeeping
    for a tensor costs about as much as the step of a small one.

    Args:
        call: the arguments, on the CPU.
        num_moments: of each parameter.

    Raises:
        ValueError: as `Call.moments`.
    """
    kept = (*call.params, *call.states, *call.errors)
    every = (*kept, *call.grads)
    key = (
        *(num_moments, call.state_format, call.rounding, *call.seeds),
        *map(Tensor.data_ptr, kept),
        *map(Tensor.numel, every),
        *map(Tensor.is_contiguous, every),
        *map(Tensor.size, (*call.params, *call.grads)),
        *[each.dtype for each in every],
        *[each.is_cpu for each in every],
    )
    plan = _plans.get(key)
    if plan is None:
        plan = plan_of_slots(call.slots(num_moments))
        _plans[key] = plan
        while sum(each.num_items for each in _plans.values()) > MAX_ITEMS and len(_plans) > 1:
            del _plans[next(iter(_plans))]
    step = int(call.step)
    addresses, seeds = list(map(Tensor.data_ptr, call.grads)), call.seeds
    return Plan(
        tuple(
            batch.with_fields(
                {
                    GRAD_FIELD: [addresses[at] for at in batch.members],
                    KEY_FIELD: [key_at(seeds[at], step) for at in batch.members],
                }
            )
            for batch in plan.batches
        ),
        plan.others,
    )


def plan_of_slots(slots: Sequence[Slot]) -> Plan:
    """Return how parameters are done."""
    batches: dict[tuple[bool, int], list[int]] = {}
    others = []
    for at, slot in enumerate(slots):
        if compiled() is None or not _suits(slot):
            others.append(at)
        elif slot.param.numel():
            how = slot.param.dtype == torch.bfloat16, ROUNDINGS.index(slot.rounding.name)
            batches.setdefault(how, []).append(at)
    found = (
        Batch(
            tuple(members),
            array("q", [field for at in members for field in _fields(slots[at])]),
            *how,
            sum(slots[at].param.numel() for at in members),
        )
        for how, members in batches.items()
    )
    return Plan(tuple(found), tuple(others))


def adamw_step(slots: Sequence[Slot], numbers: AdamWNumbers, *, plan: Plan, stochastic: bool) -> None:
    """Do one AdamW step on many parameters, in place.

    Args:
        slots: the parameters, on the CPU, of any dtypes; looked at only where the reference does them.
        numbers: the constants of this step.
        plan: how they are done.
        stochastic: round second moments at random.
    """
    for batch in plan.batches:
        batch.adamw_step(_library(), numbers, stochastic=stochastic)
    for at in plan.others:
        _warn_slow(_slow_reason(slots[at]))
        slots[at].adamw_step(numbers, stochastic=stochastic)


def sgd_step(slots: Sequence[Slot], numbers: SGDNumbers, *, plan: Plan) -> None:
    """Do one step of SGD with momentum on many parameters, in place.

    Args:
        slots: the parameters, on the CPU, of any dtypes; looked at only where the reference does them.
        numbers: the constants of this step.
        plan: how they are done.
    """
    for batch in plan.batches:
        batch.sgd_step(_library(), numbers)
    for at in plan.others:
        _warn_slow(_slow_reason(slots[at]))
        slots[at].sgd_step(numbers)


def count(steps: Sequence[Tensor], amount: int) -> bool:
    """Add to step counters, in place.

    Args:
        steps: fp32, 0-dim, on the CPU.
        amount: what is added.

    Returns:
        Whether there is a library that did it.
    """
    library = compiled()
    if library is not None:
        addresses = array("q", map(Tensor.data_ptr, steps))
        library.packlight_count(addresses.buffer_info()[0], len(addresses), amount)
    return library is not None


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Return the compiled library, built at its first use; None where it cannot be built, with one warning."""
    try:
        library = load(SOURCE)
    except (CompilerMissing, CompilerFailed) as error:
        warnings.warn(
            f"packlight's CPU kernels could not be compiled, so optimiser steps on low-bit states run in plain "
            f"PyTorch, many times slower. Install a C++ compiler, or set CXX to one. {error}",
            stacklevel=2,
        )
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.packlight_adamw_step.argtypes = [pointer, ctypes.c_int64, pointer, pointer, *[integer] * 4]
    library.packlight_sgd_step.argtypes = [pointer, ctypes.c_int64, pointer, pointer, *[integer] * 3]
    library.packlight_count.argtypes = [pointer, ctypes.c_int64, ctypes.c_float]
    library.packlight_count.restype = None
    library.packlight_adamw_step.restype = library.packlight_sgd_step.restype = None
    return library


def _library() -> ctypes.CDLL:
    library = compiled()
    assert library is not None
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
            "many times slower. Make them contiguous fp32 or bf16, or leave them to torch.optim.",
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
