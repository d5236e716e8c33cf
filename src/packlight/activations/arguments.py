"""The arguments of a recomputed block: each tensor in them is checkpoint's, and what hides tensors is watched.

`torch.utils.checkpoint` looks at the arguments that it is given, not into them. A tensor that it does not see may be
replaced or written to after the block ran; the second run then reads the new value, and the gradient is wrong without a
word. So containers are taken apart: those that pytree knows, and instances of dataclasses. Other objects cannot be
rebuilt by somebody who does not know them; of these, the tensors are noted, and a change of them is an error.

    first run     the caller's own objects: what the block writes into them must arrive
    second run    containers as they were, made anew; other objects, if they still hold what they held
"""

import copy
import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from packlight.activations.attributes import version_of

# What holds no tensors, or only such as do not belong to a call.
_OPAQUE = (type, nn.Module, FunctionType, BuiltinFunctionType, MethodType, ModuleType, torch.Generator, torch.device)
_SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size})
# A cache of layers of tensors is three deep.
_MOST_DEPTH = 5


class _Leaf(NamedTuple):
    """A value that is no container, by its position."""

    position: int


class _Tree(NamedTuple):
    """A container that pytree knows."""

    structure: TreeSpec
    children: list[Any]


@dataclasses.dataclass
class _Instance:
    """An instance of a dataclass: a copy without its values, and those."""

    shell: Any
    values: dict[str, Any]


class Arguments:
    """The arguments of one call.

    Args:
        args: by position.
        kwargs: by name.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.leaves: list[Any] = []
        self._instances: dict[int, _Instance] = {}
        self._tree = self._take((args, dict(kwargs)))
        self._instances.clear()  # they are in the tree
        self._watches = [watch for leaf in self.leaves if (watch := _watch(leaf)) is not None]

    def rebuilt(self, leaves: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments as they were, made of their leaves.

        Raises:
            RuntimeError: an object among them holds other tensors by now.
        """
        for watch in self._watches:
            watch.check()
        args, kwargs = _build(self._tree, leaves, {})
        return args, kwargs

    def _take(self, value: Any) -> _Tree:
        found, structure = tree_flatten(value)
        return _Tree(structure, [self._take_leaf(leaf) for leaf in found])

    def _take_leaf(self, leaf: Any) -> _Leaf | _Instance:
        if not _is_instance(leaf):
            self.leaves.append(leaf)
            return _Leaf(len(self.leaves) - 1)
        known = self._instances.get(id(leaf))
        if known is None:
            shell = copy.copy(leaf)
            known = self._instances[id(leaf)] = _Instance(shell, {})
            for name in _names(leaf):
                known.values[name] = self._take(_attribute(leaf, name))
                _put(shell, name, None)  # it must not hold what checkpoint may give to a tier
        return known


def _is_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, (*_OPAQUE, Tensor))


def _names(instance: Any) -> list[str]:
    """Return the names of the values that an instance of a dataclass holds, whether in slots or in a dictionary."""
    slots = [field.name for field in dataclasses.fields(instance) if _is_slot(instance, field.name)]
    return list(dict.fromkeys([*getattr(instance, "__dict__", ()), *slots]))


def _is_slot(instance: Any, name: str) -> bool:
    return name not in getattr(instance, "__dict__", ()) and type(getattr(type(instance), name, None)) is _SLOT


def _attribute(instance: Any, name: str) -> Any:
    attributes = getattr(instance, "__dict__", {})
    return attributes[name] if name in attributes else getattr(instance, name, None)


def _put(instance: Any, name: str, value: Any) -> None:
    """Set an attribute of an instance that may be frozen."""
    if name in getattr(instance, "__dict__", {}):
        instance.__dict__[name] = value
    else:
        object.__setattr__(instance, name, value)


def _build(node: Any, leaves: tuple[Any, ...], made: dict[int, Any]) -> Any:
    if isinstance(node, _Leaf):
        return leaves[node.position]
    if isinstance(node, _Tree):
        return tree_unflatten([_build(child, leaves, made) for child in node.children], node.structure)
    if id(node) not in made:
        made[id(node)] = copy.copy(node.shell)
        for name, value in node.values.items():
            _put(made[id(node)], name, _build(value, leaves, made))
    return made[id(node)]


class _Watch:
    """The tensors that an object holds, and their versions; it keeps none of them alive."""

    def __init__(self, value: Any, tensors: list[Tensor]) -> None:
        self._value = value
        self._noted = [(weakref.ref(tensor), version_of(tensor)) for tensor in tensors]

    def check(self) -> None:
        present = list(_held(self._value))
        same = len(present) == len(self._noted) and all(
            noted() is tensor and version == version_of(tensor)
            for tensor, (noted, version) in zip(present, self._noted, strict=True)
        )
        if not same:
            raise RuntimeError(
                f"an argument of type {type(self._value).__name__} of a recomputed block holds other tensors than when "
                "the block began, so that it cannot run again as it did; keep that block, or pass the tensors "
                "themselves, in a list, in a dict or in a dataclass"
            )


def _watch(leaf: Any) -> _Watch | None:
    if type(leaf) in _SIMPLE or isinstance(leaf, Tensor) or not hasattr(leaf, "__dict__") or isinstance(leaf, _OPAQUE):
        return None
    return _Watch(leaf, list(_held(leaf)))


def _held(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an object's attributes, and in containers and objects there."""
    seen: set[int] = set()
    layer = [value]
    for _ in range(_MOST_DEPTH):
        inner: list[Any] = []
        for each in layer:
            if id(each) in seen or isinstance(each, _OPAQUE):
                continue
            seen.add(id(each))
            leaves = tree_leaves(dict(getattr(each, "__dict__", {})))
            yield from (leaf for leaf in leaves if isinstance(leaf, Tensor))
            inner += [leaf for leaf in leaves if type(leaf) not in _SIMPLE and hasattr(leaf, "__dict__")]
        layer = [each for each in inner if not isinstance(each, Tensor)]


class _Slots:
    __slots__ = ("value",)


_SLOT: type = type(_Slots.__dict__["value"])
