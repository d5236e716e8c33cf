"""The optimiser steps as operators of torch: a schema, a CPU and a CUDA kernel, and a fake one.

A function that calls into a shared library or launches a Triton kernel is opaque to torch.compile, to fake
tensors and to the dispatcher. Registered as an operator it is one node with a schema that says what is changed
in place.

One call does all parameters of one device, dtype and step. The states are flat lists in the order of
`MomentFormat.tensors`, for each parameter exp_avg, then exp_avg_sq.

    torch.ops.packlight.adamw_step    torch.ops.packlight.sgd_step
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from packlight.numerics import cpu
from packlight.numerics.cpu import Slot
from packlight.numerics.formats import MomentFormat, moment_formats
from packlight.numerics.moments import Moment
from packlight.numerics.noise import key_at
from packlight.numerics.rounding import ERROR_DTYPES, Rounding, RoundingName
from packlight.numerics.settings import AdamWNumbers, SGDNumbers

MUTATED = ("params", "states", "errors")


@torch.library.custom_op("packlight::adamw_step", mutates_args=MUTATED, device_types="cpu")
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    errors: Sequence[Tensor],
    numbers: Tensor,
    step: Tensor,
    found_inf: Tensor | None,
    seeds: Sequence[int],
    state_format: str,
    stochastic: bool,
    rounding: str,
) -> None:
    """Do one AdamW step on many parameters, in place.

    Args:
        params: fp32, bf16 or fp16, any shapes: the parameters, all of one dtype; changed in place.
        grads: the same shapes: their gradients.
        states: the tensors of their moments; changed in place.
        errors: int8 or int16, one per parameter: error bits, for roundings that have them; changed in place.
        numbers: fp32, (10,): `AdamWNumbers`.
        step: fp32, 0-dim: this step's number, 1 for the first.
        found_inf: fp32, one element: nothing is done unless it is 0.
        seeds: of the parameters' random bits (`noise.seed_of`).
        state_format: a format's name.
        stochastic: round second moments at random.
        rounding: how parameters are rounded (`rounding.RoundingName`).
    """
    if found_inf is None or float(found_inf) == 0:
        slots = _slots(params, grads, states, errors, step, seeds, state_format, rounding, first_only=False)
        cpu.adamw_step(list(slots), AdamWNumbers(*numbers.tolist()), stochastic=stochastic)


@torch.library.custom_op("packlight::sgd_step", mutates_args=MUTATED, device_types="cpu")
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    errors: Sequence[Tensor],
    numbers: Tensor,
    step: Tensor,
    found_inf: Tensor | None,
    seeds: Sequence[int],
    state_format: str,
    stochastic: bool,
    rounding: str,
) -> None:
    """Do one step of SGD with momentum on many parameters, in place.

    Args:
        params: fp32, bf16 or fp16, any shapes: the parameters, all of one dtype; changed in place.
        grads: the same shapes: their gradients.
        states: the tensors of their momentum buffers; changed in place; none where there is no momentum.
        errors: int8 or int16, one per parameter: error bits, for roundings that have them; changed in place.
        numbers: fp32, (6,): `SGDNumbers`.
        step: fp32, 0-dim: this step's number, 1 for the first.
        found_inf: fp32, one element: nothing is done unless it is 0.
        seeds: of the parameters' random bits (`noise.seed_of`).
        state_format: a format's name; "" where there is no momentum.
        stochastic: has no meaning here: momentum is rounded to nearest.
        rounding: how parameters are rounded (`rounding.RoundingName`).
    """
    if found_inf is None or float(found_inf) == 0:
        slots = _slots(params, grads, states, errors, step, seeds, state_format, rounding, first_only=True)
        cpu.sgd_step(list(slots), SGDNumbers(*numbers.tolist()))


@adamw_step.register_fake
@sgd_step.register_fake
def _(*args: object) -> None:
    """Change shapes of nothing, and allocate nothing."""


@adamw_step.register_kernel("cuda")
def _adamw_step_cuda(*args: Any) -> None:
    from packlight.numerics import gpu  # imports Triton, which machines without a GPU lack

    gpu.adamw_step(*args)


@sgd_step.register_kernel("cuda")
def _sgd_step_cuda(*args: Any) -> None:
    from packlight.numerics import gpu

    gpu.sgd_step(*args)


def _slots(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    errors: Sequence[Tensor],
    step: Tensor,
    seeds: Sequence[int],
    state_format: str,
    rounding: str,
    *,
    first_only: bool,
) -> Iterator[Slot]:
    tensors, number = iter(states), int(step)
    name: RoundingName = rounding  # type: ignore[assignment]
    if name in ERROR_DTYPES and params[0].dtype == torch.bfloat16 and len(errors) != len(params):
        raise ValueError(
            f"{len(params)} bf16 parameters came with {len(errors)} tensors of error bits, one each was wanted: "
            f"rounding {name!r} needs them. Choose the rounding when the optimiser is built."
        )
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        shape = tuple(param.shape)
        formats = moment_formats(state_format, shape) if state_format else ()
        moments = tuple(_moment(each, shape, tensors) for each in formats[: 1 if first_only else 2])
        if grad.shape != param.shape:
            raise ValueError(f"a gradient of shape {tuple(grad.shape)} came for a parameter of shape {shape}")
        how = Rounding(name, _error(param, errors, index))
        yield Slot(param, grad, moments, how, key_at(seeds[index], number))


def _moment(moment_format: MomentFormat, shape: tuple[int, ...], tensors: Iterator[Tensor]) -> Moment:
    """Take a moment's tensors; kernels get their addresses, so nothing but these shapes and dtypes may pass."""
    moment = {}
    for suffix, (size, dtype) in moment_format.tensors(shape).items():
        tensor = moment[suffix] = next(tensors)
        if tensor.shape != size or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"a state tensor {suffix!r} of {tensor.dtype}, shape {tuple(tensor.shape)} came for a parameter of "
                f"shape {shape}, contiguous {dtype}, shape {size} was wanted. "
                "Remove the parameter's state after changing its shape, and leave states to load_state_dict."
            )
    return Moment(moment_format, shape, moment)


def _error(param: Tensor, errors: Sequence[Tensor], index: int) -> Tensor | None:
    if not errors:
        return None
    if errors[index].numel() != param.numel():
        raise ValueError(
            f"error bits of {errors[index].numel()} elements came for a parameter of shape {tuple(param.shape)}. "
            "Remove the parameter's state after changing its shape."
        )
    return errors[index]
