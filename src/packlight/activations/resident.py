"""Tensors that live on anyway: to move or to encode them would save nothing, and encoding them would change a weight.

A linear layer saves its weight as a transposed view, which is no Parameter, and under autocast a copy of it in 16 bits,
which is not even a view; the batch is saved by the first layer, and held by the loop. So parameters, buffers and
arguments are told by their storage, FSDP's gathered parameters by the type of the view's base, and copies of parameters
by their history, of casts and views alone. (An embedding's history leads to nothing but a parameter, too.)
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch.utils._pytree import tree_leaves

# What a copy of a parameter went through; the history of one is short.
COPYING = ("ToCopy", "T", "Transpose", "Permute", "View", "UnsafeView", "Alias", "Clone", "Slice", "Select")
MOST_STEPS = 4
_COPYING_NODES = frozenset(f"{name}Backward0" for name in COPYING)


class Parts(NamedTuple):
    """The plain tensors that a tensor consists of, and what puts them together again."""

    tensors: dict[str, Tensor]
    others: dict[str, Any]
    context: Any


class Resident:
    """The storages that live on while one forward and its backward run.

    Args:
        tensors: parameters and buffers of the model.
        arguments: of its forward, in any nesting.
    """

    def __init__(self, tensors: Iterable[Tensor], arguments: object) -> None:
        given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        parts = [part for tensor in (*tensors, *given) for part in plain_parts(tensor)]
        self._storages = {_address(part) for part in parts if _has_storage(part)}

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a plain tensor's storage lives on.

        Args:
            tensor: what autograd saves.

        Returns:
            Whether it is a parameter, a view or a copy of one, a buffer, an argument, or a view of those.
        """
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return True
        return (_has_storage(tensor) and self.has(_address(tensor))) or _is_copy_of_parameter(tensor)

    def has(self, address: int) -> bool:
        """Tell whether the storage at an address was given."""
        return address in self._storages


def _is_copy_of_parameter(tensor: Tensor) -> bool:
    node: Any = tensor.grad_fn
    for _ in range(MOST_STEPS):
        if node is None or node.name() not in _COPYING_NODES:
            break
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)  # of a leaf's node


def parts_of(tensor: Tensor) -> Parts | None:
    """Return the parts of a DTensor; None for other tensors."""
    if type(tensor) in (Tensor, nn.Parameter) or not _is_dtensor(tensor):
        return None
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: getattr(tensor, name) for name in names}
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    return Parts(tensors, {name: part for name, part in parts.items() if name not in tensors}, context)


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that have the storages of a tensor: itself, a DTensor's parts, or what `vmap` has wrapped."""
    while is_batchedtensor(tensor):
        tensor = get_unwrapped(tensor)
    parts = parts_of(tensor)
    return [tensor] if parts is None else list(parts.tensors.values())


def is_dense(tensor: Tensor) -> bool:
    """Tell whether a tensor is of no subclass and has a storage; what is lazily conjugated is dense, and not plain."""
    return type(tensor) in (Tensor, nn.Parameter) and _has_storage(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is bytes at a place: no subclass, no sparse or quantised one, no lazy conjugate."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _is_dtensor(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor" and type(tensor).__module__.startswith("torch.distributed")


def _has_storage(tensor: Tensor) -> bool:
    """Tell whether a tensor has one storage; a sparse one, or one of oneDNN's, has none that can be asked for."""
    return tensor.layout == torch.strided and not is_functorch_wrapped_tensor(tensor)


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
