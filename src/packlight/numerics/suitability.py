"""Which parameters the compiled CPU step takes, and what keeps the others from it.

It reads addresses, so a parameter and its gradient have to be contiguous and of one dtype, and it knows the formats
of this library only. A parameter that lies otherwise (channels_last, transposed, or its gradient is expanded) is lent
to it as a copy in row-major order: codes and random bits belong to places in the logical parameter, not in memory, so
the bits are the same, and checkpoints do not depend on the memory format.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from packlight.numerics.books import NORMAL_FLOAT
from packlight.numerics.call import Slot
from packlight.numerics.formats import MomentFormat

DTYPES = (torch.float32, torch.bfloat16)
# Copies are made up to this size: with the gradient's that is 64 MiB of fp32 at most, as the reference's temporaries.
MAX_COPIED_ELEMENTS = 2**23


def suits(slot: Slot) -> bool:
    """Tell whether the compiled step takes a parameter as it is."""
    return (
        _is_contiguous(slot)
        and slot.param.dtype == slot.grad.dtype
        and slot.param.dtype in DTYPES
        and bool(slot.moments)
        and all(kind_of(moment.format) is not None for moment in slot.moments)
    )


def is_plain(slot: Slot) -> bool:
    """Tell whether `descent` takes a parameter as it is: fp32, without moments."""
    return not slot.moments and slot.param.dtype == slot.grad.dtype == torch.float32 and _is_contiguous(slot)


def kind_of(moment_format: MomentFormat) -> int | None:
    """Return cpu.cpp's number of a format, None where it has none."""
    book = moment_format.book
    if moment_format.coding == "root" or book is NORMAL_FLOAT:
        four_bits = 2 if moment_format.scale == "matrix" else 1
        return four_bits if moment_format.bits == 4 else 3
    return {"fp32": 0, "softsign": 3, "expanded": 4}.get(moment_format.coding)


def slow_reason(slot: Slot) -> str | None:
    """Return what keeps a parameter from the compiled step."""
    if slot.param.dtype not in DTYPES:
        return f"parameters of {slot.param.dtype}"
    if slot.grad.dtype != slot.param.dtype:
        return f"gradients of {slot.grad.dtype} for parameters of {slot.param.dtype}"
    if not _is_contiguous(slot):
        return f"parameters of more than {MAX_COPIED_ELEMENTS} elements that, or whose gradients, are not contiguous"
    if not slot.moments:
        return f"parameters of {slot.param.dtype} under SGD without momentum"
    if any(kind_of(moment.format) is None for moment in slot.moments):
        return "states in the published formats paper4bit and factored, which exist to compare with"
    return None


@contextmanager
def contiguous(slot: Slot) -> Iterator[Slot]:
    """Lend a copy of a parameter and its gradient where these are not contiguous, and copy the parameter back."""
    if _is_contiguous(slot) or slot.param.numel() > MAX_COPIED_ELEMENTS:
        yield slot
        return
    copied = slot._replace(param=slot.param.contiguous(), grad=slot.grad.contiguous())
    yield copied
    if copied.param is not slot.param:
        slot.param.copy_(copied.param)


def _is_contiguous(slot: Slot) -> bool:
    return slot.param.is_contiguous() and slot.grad.is_contiguous()
