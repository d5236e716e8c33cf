"""Rounding a parameter to its own dtype: to nearest, at random, or with the rest kept beside it.

A bf16 parameter has 8 significant bits, so an update below 1/512 of it is lost when it is rounded to nearest.
Rounding at
random keeps it on average. Error bits keep it exactly: 16 of them beside a bf16 parameter are an fp32 number, 8
of them a 24-bit one, without a second copy of the parameter.

    fp32 bits = (bf16 bits << 16) + error, error from -2^15 to 2^15 - 1 (16 bits) or that over 256 (8 bits)

Source: Zamirai et al., "Revisiting BFloat16 Training", 2020 (arXiv 2010.06192), sections 3 and 4 (both ideas).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from packlight.numerics.chunks import read, write
from packlight.numerics.noise import PARAMETER_STREAM, halves

RoundingName = Literal["nearest", "stochastic", "master24", "master32"]
ERROR_DTYPES = {"master24": torch.int8, "master32": torch.int16}
LARGEST_ERROR_8BIT = 127


class Rounding(NamedTuple):
    """How a parameter is rounded to its dtype.

    Attributes:
        name: "nearest"; "stochastic": bf16 only; "master24" and "master32": bf16 with 8 or 16 error bits.
        error: int8 or int16, the parameter's number of elements, row-major: the error bits; changed in place.
    """

    name: RoundingName = "nearest"
    error: Tensor | None = None


def read_parameter(param: Tensor, start: int, stop: int, rounding: Rounding) -> Tensor:
    """Return a range of a parameter, error bits included.

    Args:
        param: floating point, any shape and strides.
        start: first element, counted in row-major order.
        stop: one past the last element.
        rounding: how it is rounded.

    Returns:
        fp32, (stop - start,): a view of a contiguous fp32 tensor, else a copy.
    """
    values = read(param, start, stop)
    if rounding.error is None:
        return values
    error = rounding.error[start:stop].to(torch.int32)
    return (values.view(torch.int32) + (error * 256 if rounding.name == "master24" else error)).view(torch.float32)


def write_parameter(param: Tensor, start: int, stop: int, values: Tensor, rounding: Rounding, *, key: int) -> None:
    """Store a range of a parameter.

    Args:
        param: floating point, any shape and strides; changed in place.
        start: first element, counted in row-major order.
        stop: one past the last element.
        values: fp32, (stop - start,): the new elements.
        rounding: how they are rounded.
        key: of the moments' random bits; the parameter's are others.
    """
    if param.dtype == torch.bfloat16 and rounding.name != "nearest":
        bits = values.view(torch.int32)
        if rounding.error is None:
            noise = halves(key ^ PARAMETER_STREAM, start, stop, device=values.device).to(torch.int32)
            bits = (bits + noise) & -0x10000
        else:
            whole = (bits + 0x8000) & -0x10000
            rest = bits - whole
            if rounding.name == "master24":
                rest = ((rest + 128) >> 8).clamp_(max=LARGEST_ERROR_8BIT)
            rounding.error[start:stop] = torch.where(values.isfinite(), rest, 0).to(rounding.error.dtype)
            bits = whole
        values = torch.where(values.isfinite(), bits.view(torch.float32), values)
    write(param, start, stop, values)
