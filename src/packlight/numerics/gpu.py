"""The optimiser steps on a GPU, in Triton.

One launch does all parameters of a call that are stored alike, and reads the step's constants, its number and
found_inf from device memory: nothing waits for the device, and a CUDA graph can replay it (capture it after a
first step outside, since Triton compiles there). The results are the reference's, bit for bit.

Parameters and gradients that are not contiguous, gradients of another dtype, and the published formats
(paper4bit, factored), which exist to compare with, go through the reference one by one; that does wait.

With TRITON_INTERPRET=1 in the environment everything here runs on CPU tensors, slowly.
"""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from packlight.numerics import gpu_kernels as kernels
from packlight.numerics.books import NORMAL_FLOAT, expanded_tables
from packlight.numerics.call import Call, Slot
from packlight.numerics.gpu_tables import ALIGNMENT, Group, Plan, gradients_of, plan_of
from packlight.numerics.settings import LARGEST_FP32, AdamWNumbers, AdamWSettings, SGDNumbers, SGDSettings


def adamw_step(call: Call) -> None:
    """Do one AdamW step on many parameters, in place."""
    plan = plan_of(call, num_moments=2)
    with _current_device(call.device):
        for group in plan.groups:
            maxima = torch.zeros(group.num_maxima, dtype=torch.int32, device=call.device)
            what = {"SECOND": group.kind.second, "MATRIX": group.kind.matrix, "STOCHASTIC": call.stochastic}
            kernels.adamw_kernel[(group.owners.numel(),)](**_arguments(call, group), maxima=maxima, **what)
            if group.num_vectors:
                kernels.rotate_kernel[(group.num_vectors,)](
                    group.vectors, maxima, call.found_inf, kernels.VECTOR_ELEMENTS, **kernels.VECTOR_LAUNCH_OPTIONS
                )
    for slot in _others(call, plan, num_moments=2):
        slot.adamw_step(AdamWNumbers(*call.numbers.tolist()), stochastic=call.stochastic)


def sgd_step(call: Call) -> None:
    """Do one step of SGD with momentum on many parameters, in place."""
    plan = plan_of(call, num_moments=1)
    with _current_device(call.device):
        for group in plan.groups:
            kernels.sgd_kernel[(group.owners.numel(),)](**_arguments(call, group))
    for slot in _others(call, plan, num_moments=1):
        slot.sgd_step(SGDNumbers(*call.numbers.tolist()))


def adamw_numbers(
    settings: AdamWSettings,
    *,
    step: Tensor,
    lr: Tensor | float | None = None,
    coefficient: Tensor | float | None = None,
) -> Tensor:
    """Return `settings.numbers(step)` without waiting for the device.

    Args:
        settings: the hyper-parameters.
        step: 0-dim, on the device: 1 for the first step.
        lr: 0-dim: takes the place of the settings'.
        coefficient: 0-dim: takes the place of the settings'.

    Returns:
        fp32, (10,), on the step's device: `AdamWNumbers`, computed in double precision and rounded once.
    """
    rate = _exact(settings.lr if lr is None else lr, step.device)
    scale = _exact(settings.coefficient if coefficient is None else coefficient, step.device)
    scale = -scale if settings.maximize else scale
    l2 = 0.0 if settings.decoupled else settings.weight_decay
    folded = 1.0 if l2 else scale
    correction1, correction2 = (1 - beta ** step.reshape(()).double() for beta in (settings.beta1, settings.beta2))
    numbers: dict[str, Tensor | float] = {
        "beta1": settings.beta1,
        "gradient_to_m": (1 - settings.beta1) * folded,
        "beta2": settings.beta2,
        "root_beta2": math.sqrt(settings.beta2),
        "gradient_to_root": math.sqrt(1 - settings.beta2) * folded,
        "decay": 1 - rate * settings.weight_decay if settings.decoupled else 1.0,
        "root_to_denom": torch.where(rate != 0, (correction1 / correction2.sqrt() / rate).clamp(max=LARGEST_FP32), 0.0),
        "denom_eps": torch.where(rate != 0, settings.eps * correction1 / rate, math.inf),
        "coefficient": scale,
        "l2": l2,
    }
    return _stacked(numbers, AdamWNumbers._fields, step.device)


def sgd_numbers(
    settings: SGDSettings,
    *,
    step: Tensor,
    lr: Tensor | float | None = None,
    coefficient: Tensor | float | None = None,
) -> Tensor:
    """Return `settings.numbers(step)` without waiting for the device.

    Args:
        settings: the hyper-parameters.
        step: 0-dim, on the device: 1 for the first step.
        lr: 0-dim: takes the place of the settings'.
        coefficient: 0-dim: takes the place of the settings'.

    Returns:
        fp32, (6,), on the step's device: `SGDNumbers`, computed in double precision and rounded once.
    """
    rate = _exact(settings.lr if lr is None else lr, step.device)
    scale = _exact(settings.coefficient if coefficient is None else coefficient, step.device)
    later = step.reshape(()) > 1
    numbers: dict[str, Tensor | float] = {
        "momentum": torch.where(later, _exact(settings.momentum, step.device), 0.0),
        "gradient_to_m": torch.where(later, _exact(1 - settings.dampening, step.device), 1.0),
        "m_to_p": rate * settings.momentum if settings.nesterov else rate,
        "gradient_to_p": rate if settings.nesterov else 0.0,
        "coefficient": -scale if settings.maximize else scale,
        "l2": settings.weight_decay,
    }
    return _stacked(numbers, SGDNumbers._fields, step.device)


def _exact(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.reshape(()).to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def _stacked(numbers: Mapping[str, Tensor | float], names: Sequence[str], device: torch.device) -> Tensor:
    return torch.stack([_exact(numbers[name], device) for name in names]).float()


def _current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _arguments(call: Call, group: Group) -> dict[str, Any]:
    """Return what both kernels take."""
    gradients, aligned = gradients_of(call, group)
    values, borders, limits = _tables(group.kind.first, call.device)
    dtype = call.params[0].dtype
    return {
        "tensors": group.tensors,
        "gradients": gradients,
        "owners": group.owners,
        "numbers": call.numbers,
        "step": call.step,
        "found_inf": call.found_inf,
        "values": values,
        "borders": borders,
        "limits": limits,
        "FIRST": group.kind.first,
        "TYPE": kernels.TYPES[dtype],
        "ROUNDING": call.rounding if dtype == torch.bfloat16 else "nearest",
        "WHOLE": group.kind.whole,
        "ALIGNMENT": ALIGNMENT if group.kind.aligned and aligned else 1,
        "LINES": kernels.HALF_ELEMENTS // group.kind.width,
        "WIDTH": group.kind.width,
        "TILES": kernels.TILES,
        **kernels.LAUNCH_OPTIONS,
    }


@functools.cache
def _tables(coding: str, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if coding == "expanded":
        return expanded_tables(device)
    if coding == "book":
        values = torch.tensor(NORMAL_FLOAT.values, dtype=torch.float32, device=device)
        return values, torch.tensor(NORMAL_FLOAT.cells, dtype=torch.int32, device=device), None
    return None, None, None


def _others(call: Call, plan: Plan, *, num_moments: int) -> list[Slot]:
    """Return the parameters that the reference does."""
    if not plan.others or call.is_skipped():
        return []
    slots = call.slots(num_moments)
    return [slots[index] for index in plan.others]
