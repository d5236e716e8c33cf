"""The optimiser steps as operators of torch: a schema, a CPU and a CUDA kernel, and a fake one.

A function that calls into a shared library or launches a Triton kernel is opaque to torch.compile, to fake
tensors and to the dispatcher. Registered as an operator it is one node with a schema that says what is changed
in place. One call does all parameters of one device, dtype and step; `call.Call` tells the arguments.

    torch.ops.packlight.adamw_step    torch.ops.packlight.sgd_step
"""

from typing import Any

import torch

from packlight.numerics import cpu
from packlight.numerics.call import MUTATED, SCHEMA, Call
from packlight.numerics.settings import AdamWNumbers, SGDNumbers


@torch.library.custom_op("packlight::adamw_step", mutates_args=MUTATED, device_types="cpu", schema=SCHEMA)
def adamw_step(*args: Any) -> None:
    """Do one AdamW step on many parameters, in place.

    Args:
        args: the fields of `Call`, in order.

    Raises:
        ValueError: a gradient, state or tensor of error bits does not belong to its parameter.
    """
    call = Call(*args)
    if not call.is_skipped():
        cpu.adamw_step(call.slots(2), AdamWNumbers(*call.numbers.tolist()), stochastic=call.stochastic)


@torch.library.custom_op("packlight::sgd_step", mutates_args=MUTATED, device_types="cpu", schema=SCHEMA)
def sgd_step(*args: Any) -> None:
    """Do one step of SGD with momentum on many parameters, in place.

    Args:
        args: the fields of `Call`, in order.

    Raises:
        ValueError: a gradient, state or tensor of error bits does not belong to its parameter.
    """
    call = Call(*args)
    if not call.is_skipped():
        cpu.sgd_step(call.slots(1), SGDNumbers(*call.numbers.tolist()))


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
