"""The optimiser steps as operators of torch: a schema, a CPU and a CUDA kernel, and a fake one.

A function that calls into a shared library or launches a Triton kernel is opaque to torch.compile, to fake
tensors and to the dispatcher. Registered as an operator it is one node with a schema that says what is changed
in place. One call does all parameters of one device, dtype and step; `call.Call` tells the arguments.

    torch.ops.packlight.adamw_step    torch.ops.packlight.sgd_step
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import _get_current_dispatch_mode

from packlight.numerics import cpu
from packlight.numerics.call import MUTATED, SCHEMA, Call
from packlight.numerics.settings import AdamWNumbers, SGDNumbers


def _adamw_step_cpu(*args: Any) -> None:
    """Do one AdamW step on many parameters, in place.

    Args:
        args: the fields of `Call`, in order.

    Raises:
        ValueError: a gradient, state or tensor of error bits does not belong to its parameter.
    """
    call = Call(*args)
    if not call.is_skipped():
        plan = cpu.plan_of(call, num_moments=2)
        numbers = AdamWNumbers(*call.numbers.tolist())
        cpu.adamw_step(partial(call.slots, 2), numbers, plan=plan, stochastic=call.stochastic)


def _sgd_step_cpu(*args: Any) -> None:
    """Do one step of SGD with momentum on many parameters, in place.

    Args:
        args: the fields of `Call`, in order.

    Raises:
        ValueError: a gradient, state or tensor of error bits does not belong to its parameter.
    """
    call = Call(*args)
    if not call.is_skipped():
        plan = cpu.plan_of(call, num_moments=1)
        cpu.sgd_step(partial(call.slots, 1), SGDNumbers(*call.numbers.tolist()), plan=plan)


adamw_step: CustomOpDef = torch.library.custom_op(
    "packlight::adamw_step", _adamw_step_cpu, mutates_args=MUTATED, device_types="cpu", schema=SCHEMA
)
sgd_step: CustomOpDef = torch.library.custom_op(
    "packlight::sgd_step", _sgd_step_cpu, mutates_args=MUTATED, device_types="cpu", schema=SCHEMA
)


@adamw_step.register_fake
@sgd_step.register_fake
def _(*args: object) -> None:
    """Change shapes of nothing, and allocate nothing."""


@adamw_step.register_kernel("cuda")
def _adamw_step_cuda(*args: Any) -> None:
    from packlight.numerics import gpu  # imports Triton, which machines without a GPU lack

    gpu.adamw_step(Call(*args))


@sgd_step.register_kernel("cuda")
def _sgd_step_cuda(*args: Any) -> None:
    from packlight.numerics import gpu

    gpu.sgd_step(Call(*args))


_PLAIN = {Tensor, torch.nn.Parameter}
_IS_CPU, _DTYPE = attrgetter("is_cpu"), attrgetter("dtype")
_DIRECT: dict[Any, Callable[..., None]] = {
    (adamw_step, "cpu"): _adamw_step_cpu,
    (sgd_step, "cpu"): _sgd_step_cpu,
    (adamw_step, "cuda"): _adamw_step_cuda,
    (sgd_step, "cuda"): _sgd_step_cuda,
}


def run(operator: Any, call: Call) -> None:
    """Call an operator, and its kernel at once where nobody listens.

    The dispatcher's bookkeeping of an operator takes longer than the step of a small parameter.

    Args:
        operator: `adamw_step` or `sgd_step`.
        call: its arguments.

    Raises:
        ValueError: a gradient, state or tensor of error bits does not belong to its parameter.
    """
    direct = _DIRECT.get((operator, call.device.type))
    # A negative view (of a conjugate's imaginary part) is a flag that only the dispatcher minds.
    lazy = any(map(Tensor.is_neg, call.grads))
    listens = lazy or _get_current_dispatch_mode() is not None or torch.is_grad_enabled()
    if direct is None or listens or not _PLAIN.issuperset(map(type, (*call.params, *call.grads))):
        operator(*call)
    else:
        direct(*call)
        torch.autograd.graph.increment_version((*call.params, *call.states, *call.errors))


def count(steps: Sequence[Tensor], amount: int) -> None:
    """Add to step counters, in place; on the CPU torch takes longer for that than for a small parameter's step.

    Args:
        steps: fp32, 0-dim, all on one device.
        amount: what is added.
    """
    listens = _get_current_dispatch_mode() is not None or not _PLAIN.issuperset(map(type, steps))
    plain = not listens and all(map(_IS_CPU, steps)) and set(map(_DTYPE, steps)) == {torch.float32}
    if plain and cpu.count(steps, amount):
        torch.autograd.graph.increment_version(steps)
    else:
        torch._foreach_add_(list(steps), amount)
