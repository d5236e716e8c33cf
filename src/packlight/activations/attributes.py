"""Tensors that a recomputed block's modules hold in plain attributes, which no state dict and no checkpoint knows.

A layer may keep its last output, or a running mean, in `self.state`. A second run would start from the value that the
first one left, and leave another; where forward depends on it, the gradient is wrong without a word. So attributes
that held another tensor when the first run began hold it again during the second, and the present ones come back after
it. Nothing is copied: a tensor that was written to in place cannot come back, and that is an error. (A buffer can.)

The mode of training comes back as well: a loop may evaluate between a forward and its backward.
"""

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_EVERYWHERE = frozenset(vars(nn.Module()))
_SIMPLE = frozenset({type(None), bool, int, float, str})
_ABSENT = object()


class Noted(NamedTuple):
    """A tensor in an attribute, as it was when a block's first run began.

    Attributes:
        value: the tensor without its history, which would hold the graph of the call before.
        original: a weak reference to it.
        version: its version.
    """

    value: Tensor
    original: "weakref.ref[Tensor]"
    version: int


Change = tuple[dict[str, Any], str, Any]
"""A module's attributes, a name in them, and the value that stood there."""


class Attributes:
    """What the modules of a block hold at this moment.

    Args:
        modules: of the block, all of them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._noted = [(module, *_note(vars(module))) for module in modules]

    def check(self) -> None:
        """Refuse what cannot be put back.

        Raises:
            RuntimeError: a tensor was written to in place.
        """
        for module, _, tensors in self._noted:
            for name, before in tensors.items():
                if version_of(before.value) != before.version:
                    raise RuntimeError(
                        f"the tensor in attribute {name!r} of a {type(module).__name__} was modified by an inplace "
                        "operation since its block's forward began; the block cannot be recomputed: make the tensor a "
                        "buffer, or keep the block"
                    )

    def put_back(self) -> list[Change]:
        """Let the modules hold what they held, and return what they hold now."""
        changes: list[Change] = []
        for module, simple, tensors in self._noted:
            attributes = vars(module)
            present = [name for name, value in _own(attributes) if _is_own_tensor(value)]
            for name in dict.fromkeys([*tensors, *present]):
                now, before = attributes.get(name, _ABSENT), tensors.get(name)
                if before is None or before.original() is not now:
                    changes.append((attributes, name, now))
                    _put(attributes, name, before.value if before else simple.get(name, _ABSENT))
            if simple.get("training") != attributes.get("training"):  # a scripted module has it elsewhere
                changes.append((attributes, "training", module.training))
                module.training = simple["training"]
        return changes


def take_back(changes: Iterable[Change]) -> None:
    """Undo what `put_back` did."""
    for attributes, name, value in reversed(list(changes)):
        _put(attributes, name, value)


def _note(attributes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Noted]]:
    """Return the simple values, whose places tensors may take later, and the tensors."""
    simple, tensors = {"training": attributes.get("training")}, {}
    for name, value in _own(attributes):
        if type(value) in _SIMPLE:
            simple[name] = value
        elif _is_own_tensor(value):
            tensors[name] = Noted(_without_history(value), weakref.ref(value), version_of(value))
    return simple, tensors


def _own(attributes: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the attributes that not every module has."""
    return [each for each in attributes.items() if each[0] not in _EVERYWHERE]


def _is_own_tensor(value: Any) -> bool:
    """Tell whether a value is a tensor of the module's own; FSDP keeps views of its flat parameters in attributes."""
    if type(value) in _SIMPLE or not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return False
    return not isinstance(value._base, nn.Parameter)


def _without_history(tensor: Tensor) -> Tensor:
    if tensor.grad_fn is None:
        return tensor
    with torch.no_grad():
        return tensor.detach().requires_grad_()


def _put(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place; -1 where nobody counts."""
    return -1 if tensor.is_inference() else int(tensor._version)
