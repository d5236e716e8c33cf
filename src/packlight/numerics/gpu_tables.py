"""Tables of addresses in device memory, from which the Triton kernels learn what to do.

torch's fused optimisers hand addresses over as kernel arguments, some hundred at a time, and Triton cannot. So
they are in tables on the device, made at the first step and found again by the addresses themselves: in a steady
state nothing is copied.

    params, states, errors  --->  a plan: groups of tensors stored alike, each with its tables
    gradients               --->  a table of their own per group, since freed gradients come back elsewhere

Nothing here waits for the device. In the capture of a CUDA graph, tables that are missing are filled by kernels
instead of copies, are not found again outside of it, and live on for the graph's replays.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from packlight.numerics import formats
from packlight.numerics.call import Call
from packlight.numerics.formats import BLOCK_ELEMENTS, MomentFormat
from packlight.numerics.gpu_kernels import HALF_ELEMENTS, TILES, TYPES
from packlight.numerics.moments import Moment
from packlight.numerics.rounding import ERROR_DTYPES

# The widest load of a thread: tensors whose addresses are multiples of it go faster.
ALIGNMENT = 16
# Addresses that keep changing would fill the memory with tables.
MAX_TABLE_BYTES = 2**25
MAX_GRADIENT_TABLES = 16

# Coding of the moments, and elements of half a block (32 where blocks have 32).
CODINGS: dict[tuple[MomentFormat, ...], tuple[str, str, int]] = {
    (): ("", "", 64),
    (formats.FP32,): ("fp32", "", 64),
    (formats.FP32, formats.FP32): ("fp32", "fp32", 64),
    (formats.NORMAL_BLOCKS,): ("book", "", 64),
    (formats.NORMAL_BLOCKS, formats.ROOT_BLOCKS): ("book", "root", 64),
    (formats.NORMAL_BLOCKS, formats.ROOT_MATRIX): ("book", "root", 64),
    (formats.NORMAL_BLOCKS, formats.ROOT_MATRIX_PIECE): ("book", "root", 64),
    (formats.SOFTSIGN_8BIT,): ("softsign", "", 32),
    (formats.SOFTSIGN_8BIT, formats.ROOT_8BIT): ("softsign", "root", 32),
    (formats.EXPANDED_SIGNED,): ("expanded", "", 64),
    (formats.EXPANDED_SIGNED, formats.EXPANDED): ("expanded", "expanded", 64),
}


class Kind(NamedTuple):
    """What tensors of one launch have in common.

    Attributes:
        first: coding of exp_avg or of the momentum buffer; "" for none.
        second: coding of exp_avg_sq; "" for none.
        width: elements of half a block.
        matrix: "" for scales of blocks alone; "strips" for matrices of whole blocks a row; "blocks" for others.
        deferred: whether the matrices' new maxima are left as they are found.
        whole: whether the last block is whole.
        aligned: whether addresses are multiples of ALIGNMENT.
    """

    first: str
    second: str
    width: int
    matrix: str
    deferred: bool
    whole: bool
    aligned: bool


@dataclass(frozen=True)
class Group:
    """Tensors of one launch, and their tables on the device (see `gpu_kernels`).

    Attributes:
        kind: what they have in common.
        members: their places in the call.
        tensors: int64, (members, 16).
        owners: int32, (programs,).
        vectors: int64, (row and column vectors of matrices, 4).
        num_vectors: how many.
        num_maxima: elements of all those vectors.
        gradients: tables by the addresses in them.
    """

    kind: Kind
    members: tuple[int, ...]
    tensors: Tensor
    owners: Tensor
    vectors: Tensor
    num_vectors: int
    num_maxima: int
    gradients: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Return the tables but for those of gradients."""
        return self.tensors, self.owners, self.vectors


class Plan(NamedTuple):
    """How a call's parameters are done: groups of them by kernels, the others by the reference."""

    groups: tuple[Group, ...]
    others: tuple[int, ...]


_plans: dict[tuple[object, ...], Plan] = {}
_captured: list[Tensor] = []


def plan_of(call: Call, *, num_moments: int) -> Plan:
    """Return how a call's parameters are done, the same as for an earlier call with the same addresses.

    Args:
        call: the arguments.
        num_moments: of each parameter.

    Returns:
        The plan.
    """
    every = (*call.params, *call.grads, *call.states, *call.errors)
    key = (num_moments, call.state_format, call.rounding, *call.seeds, *map(_signature, every))
    addresses = tuple(each.data_ptr() for each in (*call.params, *call.states, *call.errors))
    plan = _plans.get((key, addresses))
    if plan is None:
        plan = _new_plan(call, num_moments)
        if not _capturing(call.device):
            if _num_bytes() > MAX_TABLE_BYTES:
                _plans.clear()
            _plans[key, addresses] = plan
    if _capturing(call.device):
        _captured.extend(table for group in plan.groups for table in group.tables)
    return plan


def gradients_of(call: Call, group: Group) -> tuple[Tensor, bool]:
    """Return the table of a group's gradients, and whether all are aligned."""
    addresses = tuple(call.grads[member].data_ptr() for member in group.members)
    table = group.gradients.get(addresses)
    if table is None:
        table = _on_device(addresses, call.device)
        if not _capturing(call.device):
            if len(group.gradients) >= MAX_GRADIENT_TABLES:
                group.gradients.clear()
            group.gradients[addresses] = table
    if _capturing(call.device):
        _captured.append(table)
    return table, all(address % ALIGNMENT == 0 for address in addresses)


def _signature(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.is_contiguous()


def _new_plan(call: Call, num_moments: int) -> Plan:
    groups: dict[Kind, dict[int, list[int]]] = {}
    others = []
    for index, moments in enumerate(call.moments(num_moments)):
        if not _suits(call, index, moments):
            others.append(index)
        elif call.params[index].numel():
            row = _row(call, index, moments)
            groups.setdefault(_kind(moments, row), {})[index] = row
    return Plan(tuple(_group(kind, rows, call.device) for kind, rows in groups.items()), tuple(others))


def _suits(call: Call, index: int, moments: tuple[Moment, ...]) -> bool:
    param, grad = call.params[index], call.grads[index]
    if param.dtype not in TYPES or param.dtype != grad.dtype or not (param.is_contiguous() and grad.is_contiguous()):
        return False
    error_dtype = call.errors[index].dtype if call.errors else None
    if error_dtype != ERROR_DTYPES.get(call.rounding) or (call.errors and param.dtype != torch.bfloat16):
        return False
    return tuple(moment.format for moment in moments) in CODINGS


def _kind(moments: tuple[Moment, ...], row: list[int]) -> Kind:
    numel, addresses, num_columns = row[2], (*row[:2], *row[5:13]), row[14]
    matrix = ("blocks" if num_columns % BLOCK_ELEMENTS else "strips") if num_columns else ""
    aligned = all(address % ALIGNMENT == 0 for address in addresses)
    codings = CODINGS[tuple(moment.format for moment in moments)]
    deferred = bool(moments) and moments[-1].format.deferred
    return Kind(*codings, matrix, deferred, whole=numel % BLOCK_ELEMENTS == 0, aligned=aligned)


def _row(call: Call, index: int, moments: tuple[Moment, ...]) -> list[int]:
    """Return a row of `tensors`; the first program and the start of the maxima are still 0."""
    param = call.params[index]
    row = [param.data_ptr(), _address(call.errors[index] if call.errors else None), param.numel(), call.seeds[index], 0]
    for moment in (*moments, None, None)[:2]:
        tensors = {} if moment is None else moment.tensors
        row += [_address(tensors.get("", tensors.get("codes"))), *map(_address, map(tensors.get, ("scale", "power")))]
    last = moments[-1].tensors if moments else {}
    rows, cols = last.get("rows"), last.get("cols")
    num_rows, num_columns = (0 if each is None else each.shape[1] for each in (rows, cols))
    return [*row, _address(rows), _address(cols), num_rows, num_columns, 0]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _group(kind: Kind, rows: dict[int, list[int]], device: torch.device) -> Group:
    num_programs = [_num_programs(kind, row) for row in rows.values()]
    vectors: list[list[int]] = []
    first_program = start = 0
    for row, programs in zip(rows.values(), num_programs, strict=True):
        row[4], row[15] = first_program, start
        first_program += programs
        for address, length, is_column in ((row[11], row[13], 0), (row[12], row[14], 1)) if kind.matrix else ():
            vectors.append([address, length, start, is_column + 2 * kind.deferred])
            start += length
    return Group(
        kind,
        tuple(rows),
        _on_device(_flat(rows.values()), device),
        _owners(num_programs, device),
        _on_device(_flat(vectors), device),
        len(vectors),
        start,
    )


def _num_programs(kind: Kind, row: list[int]) -> int:
    lines_per_program = HALF_ELEMENTS // kind.width * TILES
    if kind.matrix == "strips":
        return math.ceil(row[13] / lines_per_program) * (row[14] // BLOCK_ELEMENTS)
    lines = math.ceil(row[2] / BLOCK_ELEMENTS) * (BLOCK_ELEMENTS // 2 // kind.width)
    return math.ceil(lines / lines_per_program)


def _flat(rows: Iterable[list[int]]) -> list[int]:
    return [number for row in rows for number in row]


def _owners(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.repeat_interleave(_on_device(counts, device), output_size=sum(counts)).to(torch.int32)


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 numbers on a device; in a capture they travel as arguments of kernels."""
    if _capturing(device) and numbers:
        table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
        torch._foreach_add_(table.unbind(), list(numbers))
        return table
    host = torch.tensor(numbers, dtype=torch.int64)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _num_bytes() -> int:
    return sum(table.nbytes for plan in _plans.values() for group in plan.groups for table in group.tables)
