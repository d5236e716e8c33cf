"""What stands against compact states for an optimiser that exists already, by its options and its parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from packlight.optim.state import PARAMETER_DTYPES


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


def raise_if(reason: str | None) -> None:
    """Raise ValueError where there is a reason."""
    if reason is not None:
        raise ValueError(
            f"the optimiser cannot have compact states: {reason}. "
            "Use a plain torch.optim.AdamW or Adam, or leave the states in fp32."
        )
