"""What stands against compact states for an optimiser that exists already, by its options and its parameters."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from packlight.numerics.formats import state_format as format_named
from packlight.optim.hosted import placed
from packlight.optim.piece import is_dtensor
from packlight.optim.state import PARAMETER_DTYPES, check_dtype


def group_refusal(group: Mapping[str, Any]) -> str | None:
    """Tell what of a param group the compact step does not know; None where it knows all."""
    for option in ("amsgrad", "capturable", "differentiable"):
        if group.get(option):
            return f"a param group has {option}=True, which the compact step does not know"
    for param in group["params"]:
        if isinstance(param, Tensor) and param.is_complex():
            return f"a parameter of shape {tuple(param.shape)} is complex"
        if isinstance(param, Tensor) and param.layout != torch.strided:
            return f"a parameter of shape {tuple(param.shape)} is sparse"
        if isinstance(param, Tensor) and param.dtype not in PARAMETER_DTYPES:
            return f"a parameter of shape {tuple(param.shape)} is {param.dtype}"
    return None


def check_formats(own: Collection[Tensor], state_formats: Mapping[Tensor, str]) -> None:
    """Check what states are to be kept in.

    Args:
        own: the optimiser's parameters.
        state_formats: from parameter to a format's name, with "@host" behind it where the state is in host memory.

    Raises:
        ValueError: a format is unknown, or a parameter is not the optimiser's, of a dtype that the formats do not take,
            or a DTensor whose state would be in host memory.
    """
    for param, chosen in state_formats.items():
        if param not in own:
            raise ValueError(
                f"state_formats names a parameter of shape {tuple(param.shape)} that is not the optimiser's; "
                "wanted only parameters of its param_groups. Call adopt after add_param_group."
            )
        name, on_host = placed(chosen)
        if on_host and is_dtensor(param):
            raise ValueError(
                f"{chosen!r} came for a parameter of shape {tuple(param.shape)} that is a DTensor; its state can be in "
                "host memory if the parameter is, too: shard it with CPUOffloadPolicy"
            )
        if format_named(name).name != "fp32" or on_host:
            check_dtype(param.dtype)


def raise_if(reason: str | None) -> None:
    """Raise ValueError where there is a reason."""
    if reason is not None:
        raise ValueError(
            f"the optimiser cannot have compact states: {reason}. "
            "Use a plain torch.optim.AdamW or Adam, or leave the states in fp32."
        )
