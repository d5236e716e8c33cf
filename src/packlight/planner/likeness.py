"""Copies of a model and its optimisers that behave as these do, where `copy.deepcopy` alone loses something.

Of an optimiser torch copies param groups and states, and not what a class of another library keeps beside them; its
step then fails on a name that is not there. A parameter of such a class may copy itself by its own rule, which makes a
real tensor where a fake one was wanted. bitsandbytes does both: its optimisers have settings and a manager that knows
parameters by their `id`, and its 4-bit weights are parameters on which scales and tables hang that no module lists.

Here parameters with a rule of their own are put into the copy's memo before anything is copied, with all that hangs on
them, and what an optimiser lost is given to its copy. Nothing of bitsandbytes is imported: its objects are told by what
they have (bitsandbytes 0.50.2, `optim/optimizer.py` and `nn/modules.py`).
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packlight.budget import format_bytes
from packlight.planner.tensors import flat_tensors

PAGED_ELEMENTS = 100_000
"""Below so many elements of a parameter a paged optimiser's states are ordinary (`get_state_buffer`)."""
_MANAGED = "packlight_managed"


def likeness(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    memo: dict[int, Any],
    fake: Callable[[Tensor], Tensor],
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Copy a model and its optimisers together; call it where `copy.deepcopy` makes fake tensors.

    Args:
        model: the model.
        optimizers: of its parameters.
        memo: what stands for some objects already, by their `id`.
        fake: makes a fake tensor of a real one.

    Returns:
        The copies.
    """
    for parameter in model.parameters():
        if id(parameter) not in memo and _copies_itself(parameter):
            _copy_parameter(parameter, memo, fake)
    copied_model, copied = copy.deepcopy((model, list(optimizers)), memo)
    for optimizer, other in zip(optimizers, copied, strict=True):
        if _loses(type(optimizer)):
            _complete(optimizer, other, memo)
    return copied_model, copied


def _loses(kind: type) -> bool:
    """Tell whether a class of optimisers is another library's, and frees nothing that a copy would free once more."""
    return kind.__module__.partition(".")[0] not in ("torch", "packlight") and not hasattr(kind, "__del__")


def _copies_itself(parameter: Tensor) -> bool:
    own = getattr(type(parameter), "__deepcopy__", None)
    return own not in (Tensor.__deepcopy__, nn.Parameter.__deepcopy__) and bool(vars(parameter))


def _copy_parameter(parameter: nn.Parameter, memo: dict[int, Any], fake: Callable[[Tensor], Tensor]) -> None:
    """Put a fake parameter into the memo, with copies of what hangs on it (a module that refers to it among them)."""
    made = nn.Parameter(fake(parameter.data), requires_grad=parameter.requires_grad)
    memo[id(parameter)] = made
    for name, value in vars(parameter).items():
        setattr(made, name, copy.deepcopy(value, memo))


def _complete(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer, memo: dict[int, Any]) -> None:
    """Give a copy what torch's way of copying left out; functions, which may be bound to the original, stay out."""
    for name, value in vars(optimizer).items():
        if name not in vars(other) and not (inspect.isroutine(value) or isinstance(value, partial)):
            with suppress(Exception):  # what cannot be copied is missed by the step, and told with it
                setattr(other, name, copy.deepcopy(value, memo))
    manager: Any = getattr(other, "mng", None)
    settings = getattr(manager, "pid2config", None)
    if isinstance(settings, dict):  # by `id`, which is another one for a copy
        manager.pid2config = {id(memo[key]) if key in memo else key: value for key, value in settings.items()}


def attached(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that hang on parameters, and are neither parameters nor buffers of a module.

    Args:
        parameters: of a model.
    """
    return [tensor for each in parameters for value in vars(each).values() for tensor in _inside(value, depth=3)]


def _inside(value: object, *, depth: int) -> Iterator[Tensor]:
    """Yield the tensors of an object's attributes: a 4-bit weight has them in a state, and that in a second one."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        for item in vars(value).values():
            yield from _inside(item, depth=depth - 1)


# States that stand elsewhere than torch's


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all tensors that are an optimiser's states: what torch lists, and the tables that 8-bit states share.

    The tables (2 KiB) are there before the first step, and stand in the states from then on.

    Args:
        optimizer: any.
    """
    tables = getattr(optimizer, "name2qmap", None)
    return list(flat_tensors([*optimizer.state.values(), tables if isinstance(tables, dict) else {}]))


def keep_paged_apart(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Let copies of bitsandbytes' paged optimisers make fake states, and mark those that a GPU has in managed memory.

    Such memory is CUDA's own (`cudaMallocManaged`): it lies outside of the allocator, on the host or on the device as
    the driver moves it.

    Args:
        optimizers: copies on fake tensors, for a GPU.
    """
    paged: list[Any] = [each for each in optimizers if getattr(each, "is_paged", False)]
    for optimizer in paged:
        optimizer.get_state_buffer = _state_buffer
        optimizer.prefetch_state = _stay


def _state_buffer(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.zeros_like(parameter, dtype=dtype)
    setattr(made, _MANAGED, parameter.numel() >= PAGED_ELEMENTS)
    return made


def _stay(parameter: Tensor) -> None:
    """Do nothing: a fake state is not moved."""


def is_managed(state: Tensor) -> bool:
    """Tell whether a fake state stands for one in managed memory."""
    return bool(getattr(state, _MANAGED, False))


def paged_notes(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[str]:
    """Say where the states of paged optimisers are, or that this device has no such.

    Args:
        optimizers: copies on fake tensors, which have stepped.

    Yields:
        A line for each that is paged.
    """
    for optimizer in (each for each in optimizers if getattr(each, "is_paged", False)):
        name = type(optimizer).__name__
        if "get_state_buffer" in vars(optimizer):
            managed_bytes = sum(each.nbytes for each in state_tensors(optimizer) if is_managed(each))
            yield (
                f"{format_bytes(managed_bytes)} of the states of {name} are CUDA's managed memory, which the driver "
                "moves between host and device: counted neither in the budget nor in host memory"
            )
        else:
            yield f"bitsandbytes' paged optimisers need CUDA: here the states of {name} are ordinary tensors"
