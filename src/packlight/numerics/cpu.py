"""The optimiser steps on the CPU: compiled, or the reference where there is no compiler.

A compiled library does one kind of step: one optimiser, dtype, rounding and state format. So a process builds what
its parameters need, in a second each, and no more; all parameters of a kind are done in one parallel region. It takes
contiguous fp32 and bf16 parameters, and copies of those that lie otherwise. What it does not take (`suitability`) goes
through the reference one by one, and a warning says so. Without moments there is nothing to decode: `descent` does
fp32 parameters of plain SGD.

A record per parameter is 16 integers (see `Item` in cpu.cpp). Records are made at the first step and found again by
the addresses in them.
"""

import ctypes
import functools
import warnings
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from packlight.numerics.call import Call, Slot
from packlight.numerics.compiler import CompilerFailed, CompilerMissing, load_all
from packlight.numerics.cpu_tables import tables
from packlight.numerics.descent import descend
from packlight.numerics.noise import WEYL, mixed, signed
from packlight.numerics.rounding import RoundingName
from packlight.numerics.settings import AdamWNumbers, SGDNumbers
from packlight.numerics.suitability import contiguous, is_plain, kind_of, slow_reason, suits

SOURCE = Path(__file__).with_name("cpu.cpp")
ROUNDINGS: tuple[RoundingName, ...] = ("nearest", "stochastic", "master24", "master32")
# The fastest way to hand out a few thousand elements is not to.
SERIAL_ELEMENTS = 2**15
# Addresses that keep changing would fill the memory with plans: 128 bytes a record.
MAX_ITEMS = 2**16
# Of an item: what a plan that is found again has not.
NUM_FIELDS, GRAD_FIELD, KEY_FIELD = 16, 1, 13

_IS_CPU, _DTYPE, _NBYTES = map(attrgetter, ("is_cpu", "dtype", "nbytes"))
# A seed's share of a key (`noise.key_at`), which does not change from step to step.
_mixed = functools.lru_cache(MAX_ITEMS)(mixed)


class Kind(NamedTuple):
    """What a compiled library does: the macros of cpu.cpp.

    Attributes:
        kind: how moments are stored, cpu.cpp's number (`suitability.kind_of`).
        bf16: whether parameters are bf16; fp32 otherwise.
        rounding: of parameters: index in ROUNDINGS.
        moments: 2 for AdamW, 1 for SGD.
        stochastic: whether second moments are rounded at random.
    """

    kind: int
    bf16: bool
    rounding: int
    moments: int
    stochastic: bool = False

    def macros(self) -> dict[str, int]:
        """Return the macros."""
        return {f"PACKLIGHT_{name.upper()}": int(value) for name, value in self._asdict().items()}


class Batch(NamedTuple):
    """Parameters of one kind, that one call of a library does.

    Attributes:
        members: their places among the parameters that came.
        items: 16 integers a member: `Item` in cpu.cpp.
        kind: which kind, apart from whether second moments are rounded at random.
        num_elements: of all of them.
    """

    members: tuple[int, ...]
    items: "array[int]"
    kind: Kind
    num_elements: int

    def kind_of_step(self, *, stochastic: bool) -> Kind:
        """Return which kind does a step: `stochastic` as for `adamw_step`."""
        has_codes, is_adamw = self.kind.kind != 0, self.kind.moments == 2
        return self.kind._replace(stochastic=stochastic and has_codes and is_adamw)

    def has_noise(self, *, stochastic: bool) -> bool:
        """Tell whether a step uses the keys: `stochastic` as for `adamw_step`."""
        rounds_parameters = self.kind.bf16 and ROUNDINGS[self.kind.rounding] == "stochastic"
        return rounds_parameters or self.kind_of_step(stochastic=stochastic).stochastic

    def with_fields(self, fields: Mapping[int, list[int]]) -> "Batch":
        """Return a copy with other values in some fields: another thread may be reading this one's."""
        items = self.items[:]
        for field, values in fields.items():
            items[field::NUM_FIELDS] = array("q", values)
        return self._replace(items=items)

    def step(self, library: ctypes.CDLL, numbers: AdamWNumbers | SGDNumbers) -> None:
        """Do one step.

        Args:
            library: of the step's kind.
            numbers: the constants of this step.
        """
        library.packlight_step(
            self.items.buffer_info()[0],
            len(self.members),
            (ctypes.c_float * len(numbers))(*numbers),
            ctypes.byref(tables()),
            1 if self.num_elements <= SERIAL_ELEMENTS else torch.get_num_threads(),
        )


class Plan(NamedTuple):
    """How parameters are done.

    Attributes:
        batches: those that libraries do, where they can be built.
        others: the places of those that the reference does, or that are copied for the library.
        plain: the places of those without moments, which `descent` does.
        pairs: these and their gradients; a plan that is kept has none.
    """

    batches: tuple[Batch, ...]
    others: tuple[int, ...]
    plain: tuple[int, ...] = ()
    pairs: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def num_items(self) -> int:
        """Return how many records it has, at least 1."""
        return 1 + len(self.plain) + sum(len(batch.members) for batch in self.batches)


_plans: dict[tuple[object, ...], Plan] = {}
_libraries: dict[Kind, ctypes.CDLL] = {}


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
    key = _key_of(call, num_moments)
    plan = _plans.get(key)
    if plan is None:
        plan = plan_of_slots(call.slots(num_moments))._replace(pairs=())
        _plans[key] = plan
        while sum(each.num_items for each in _plans.values()) > MAX_ITEMS and len(_plans) > 1:
            del _plans[next(iter(_plans))]
    addresses = array("q", map(Tensor.data_ptr, call.grads))
    batches = (_renewed(batch, call, addresses) for batch in plan.batches)
    pairs = ((call.params[at], call.grads[at]) for at in plan.plain)
    return Plan(tuple(batches), plan.others, plan.plain, tuple(pairs))


def _key_of(call: Call, num_moments: int) -> tuple[object, ...]:
    """Return all that a plan hangs on, in as few objects as there can be: they are hashed and compared.

    Tensors of other shapes with as many bytes at the same addresses would have the same plan: one that has a matrix
    has its number of columns in the bytes of "cols".
    """
    kept, laid_out = (*call.params, *call.states, *call.errors), (*call.params, *call.grads)
    return (
        *(num_moments, call.state_format, call.rounding, len(call.params), len(call.grads), len(call.states)),
        array("q", map(Tensor.data_ptr, kept)).tobytes(),
        array("q", map(_NBYTES, (*kept, *call.grads))).tobytes(),
        bytes(map(Tensor.is_contiguous, laid_out)),
        bytes(map(_IS_CPU, call.grads)),
        _one_or_all(map(_DTYPE, laid_out)),
    )


def _one_or_all(values: Iterable[object]) -> object:
    found = tuple(values)
    return found[0] if len(set(found)) == 1 else found


def _renewed(batch: Batch, call: Call, addresses: "array[int]") -> Batch:
    """Return a batch with this step's gradients, and its keys where it rounds at random."""
    fields = {GRAD_FIELD: [addresses[at] for at in batch.members]}
    if batch.has_noise(stochastic=call.stochastic):
        step, seeds = int(call.step) * WEYL, call.seeds
        fields[KEY_FIELD] = [seeds[at] >> 32 << 32 | mixed(_mixed(seeds[at]) + step) for at in batch.members]
    return batch.with_fields(fields)


def plan_of_slots(slots: Sequence[Slot]) -> Plan:
    """Return how parameters are done."""
    batches: dict[Kind, list[int]] = {}
    others, plain = [], []
    for at, slot in enumerate(slots):
        if is_plain(slot):
            plain.append(at)
        elif not suits(slot):
            others.append(at)
        elif slot.param.numel():
            kind, is_bf16 = kind_of(slot.moments[-1].format), slot.param.dtype == torch.bfloat16
            assert kind is not None
            rounding = ROUNDINGS.index(slot.rounding.name) if is_bf16 else 0
            batches.setdefault(Kind(kind, is_bf16, rounding, len(slot.moments)), []).append(at)
    found = (
        Batch(
            tuple(members),
            array("q", [field for at in members for field in _fields(slots[at])]),
            kind,
            sum(slots[at].param.numel() for at in members),
        )
        for kind, members in batches.items()
    )
    return Plan(tuple(found), tuple(others), tuple(plain), tuple((slots[at].param, slots[at].grad) for at in plain))


def adamw_step(slots: Callable[[], Sequence[Slot]], numbers: AdamWNumbers, *, plan: Plan, stochastic: bool) -> None:
    """Do one AdamW step on many parameters, in place.

    Args:
        slots: return the parameters, on the CPU, of any dtypes; called only where the reference does some of them.
        numbers: the constants of this step.
        plan: how they are done.
        stochastic: round second moments at random.
    """
    left = [*plan.others, *_step(plan.batches, numbers, stochastic=stochastic)]
    found = slots() if left else []
    for at in left:
        with contiguous(found[at]) as slot:
            batches = plan_of_slots([slot]).batches
            if not batches or _step(batches, numbers, stochastic=stochastic):
                _warn_slow(slow_reason(slot))
                slot.adamw_step(numbers, stochastic=stochastic)


def sgd_step(slots: Callable[[], Sequence[Slot]], numbers: SGDNumbers, *, plan: Plan) -> None:
    """Do one step of SGD with momentum on many parameters, in place.

    Args:
        slots: return the parameters, on the CPU, of any dtypes; called only where the reference does some of them.
        numbers: the constants of this step.
        plan: how they are done.
    """
    if plan.pairs:
        descend(plan.pairs, numbers)
    left = [*plan.others, *_step(plan.batches, numbers, stochastic=False)]
    found = slots() if left else []
    for at in left:
        with contiguous(found[at]) as slot:
            copied = plan_of_slots([slot])
            if copied.pairs:
                descend(copied.pairs, numbers)
            elif not copied.batches or _step(copied.batches, numbers, stochastic=False):
                _warn_slow(slow_reason(slot))
                slot.sgd_step(numbers)


def _step(batches: Sequence[Batch], numbers: AdamWNumbers | SGDNumbers, *, stochastic: bool) -> list[int]:
    """Do what the libraries can, and return the places of the parameters that are left: none, or all."""
    libraries = compiled(tuple(batch.kind_of_step(stochastic=stochastic) for batch in batches))
    if libraries is None:
        return [at for batch in batches for at in batch.members]
    for batch, library in zip(batches, libraries, strict=True):
        batch.step(library, numbers)
    return []


def count(steps: Sequence[Tensor], amount: int) -> bool:
    """Add to step counters, in place.

    Args:
        steps: fp32, 0-dim, on the CPU.
        amount: what is added.

    Returns:
        Whether there is a library that did it.
    """
    library = next(iter(_libraries.values()), None)
    if library is not None:
        addresses = array("q", map(Tensor.data_ptr, steps))
        library.packlight_count(addresses.buffer_info()[0], len(addresses), amount)
    return library is not None


@functools.cache
def compiled(kinds: tuple[Kind, ...]) -> tuple[ctypes.CDLL, ...] | None:
    """Return compiled libraries, built at their first use; None where they cannot be built, with one warning.

    Args:
        kinds: what they do.
    """
    try:
        libraries = load_all(SOURCE, [kind.macros() for kind in kinds])
    except (CompilerMissing, CompilerFailed) as error:
        _warn_missing(str(error))
        return None
    pointer = ctypes.c_void_p
    for kind, library in zip(kinds, libraries, strict=True):
        library.packlight_step.argtypes = [pointer, ctypes.c_int64, pointer, pointer, ctypes.c_int]
        library.packlight_count.argtypes = [pointer, ctypes.c_int64, ctypes.c_float]
        library.packlight_step.restype = library.packlight_count.restype = None
        _libraries[kind] = library
    return tuple(libraries)


@functools.cache
def _warn_missing(error: str) -> None:
    warnings.warn(
        f"packlight's CPU kernels could not be compiled, so optimiser steps on low-bit states run in plain "
        f"PyTorch, many times slower. Install a C++ compiler, or set CXX to one. {error}",
        stacklevel=2,
    )


@functools.cache
def _warn_slow(reason: str | None) -> None:
    """Say once for each reason that steps are slow."""
    if reason is not None and _libraries:
        warnings.warn(
            f"the compiled optimiser step does not take {reason}; these are updated in plain PyTorch, "
            "many times slower. It takes contiguous fp32 and bf16 parameters, gradients of the same dtype and states "
            "in fp32, 8bit, fp8 or 4bit, for plain SGD fp32 alone; leave others to torch.optim.",
            stacklevel=2,
        )


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
    return [*pointers, slot.param.numel(), columns, signed(slot.key), bool(slot.moments) and last.format.deferred, 0]
