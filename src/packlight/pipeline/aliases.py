"""Tensors that stand for others, so that these can be without data while torch still needs their shapes and histories.

Autograd keeps a stage's inputs and outputs until backward, for their histories alone. A module that gets an alias, or
whose output torch sees an alias of, does not mind when the data of torch's own is taken away.
"""

from typing import Any

import torch
from torch import Tensor


class Handed(torch.autograd.Function):
    """The same tensor as an object of its own, which nothing refers to as its base."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return the tensor's data as another tensor."""
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient."""
        return gradient


HANDED = Handed._backward_cls


def handed(tensor: Tensor) -> Tensor:
    """Return an alias of a tensor that requires a gradient; others as they are."""
    if type(tensor) is not Tensor or not tensor.requires_grad:
        return tensor
    made: Tensor = Handed.apply(tensor)  # type: ignore[no-untyped-call]
    return made


def take_data(tensor: Tensor) -> None:
    """Let a tensor keep its shape and history, and a single element for all its bytes."""
    key = tensor.dtype, tensor.device
    if key not in _ONE:
        _ONE[key] = tensor.new_empty(1)
    tensor.data = _ONE[key].expand(tensor.shape)


_ONE: dict[tuple[torch.dtype, torch.device], Tensor] = {}
"""An element for all tensors without data."""
