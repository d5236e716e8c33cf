"""What a checkpoint holds: dictionaries and lists, nested, with tensors in them; and where the optimiser is.

Trainers name their entries as they like ("optimizer", "optim", "optimizer_state_dict"). An optimiser's state dict is
known by its own two entries instead, and a model's by being names and tensors only.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]

MODEL_NAMES = ("model", "module", "state_dict", "model_state_dict")
"""Which of several models in a checkpoint is the one that is trained (others: an average of its weights)."""


def is_optimizer(value: Any) -> bool:
    """Tell whether a value is an optimiser's state dict."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(isinstance(each, Mapping) and "params" in each for each in groups)


def is_model(value: Any) -> bool:
    """Tell whether a value is a model's state dict: names and tensors, at least one of them floating point."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    tensors = {key: each for key, each in value.items() if not key.endswith("_extra_state")}
    return all(isinstance(each, Tensor) for each in tensors.values()) and any(
        each.is_floating_point() and each.dim() for each in tensors.values()
    )


def optimizers_in(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Yield where optimisers are."""
    if is_optimizer(tree):
        yield path
    else:
        for key, value in entries(tree):
            yield from optimizers_in(value, (*path, key))


def models_in(tree: Any, path: Path = ()) -> Iterator[Path]:
    """Yield where models are, those with usual names first."""
    found = sorted(_models_in(tree, path), key=lambda each: _rank(each))
    yield from found


def _models_in(tree: Any, path: Path) -> Iterator[Path]:
    if is_optimizer(tree):
        return
    if is_model(tree):
        yield path
    else:
        for key, value in entries(tree):
            yield from _models_in(value, (*path, key))


def _rank(path: Path) -> int:
    name = path[-1] if path else ""
    return MODEL_NAMES.index(name) if name in MODEL_NAMES else len(MODEL_NAMES)


def entries(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the entries of a container, none of anything else."""
    if isinstance(tree, Mapping):
        yield from tree.items()
    elif isinstance(tree, list | tuple):
        yield from enumerate(tree)


def at(tree: Any, path: Path) -> Any:
    """Return what is at a place."""
    for key in path:
        tree = tree[key]
    return tree


def replaced(tree: Any, path: Path, value: Any) -> Any:
    """Return a tree with something else at a place; all but the containers on the way there is shared."""
    if not path:
        return value
    first, *rest = path
    inner = replaced(tree[first], tuple(rest), value)
    if isinstance(tree, tuple):
        made = [inner if at == first else each for at, each in enumerate(tree)]
        return type(tree)(*made) if hasattr(tree, "_fields") else type(tree)(made)
    changed = copy.copy(tree)
    changed[first] = inner
    return changed


def tensors_in(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield all tensors, and where they are."""
    if isinstance(tree, Tensor):
        yield path, tree
    else:
        for key, value in entries(tree):
            yield from tensors_in(value, (*path, key))


def nbytes(tree: Any) -> int:
    """Return the bytes of all tensors; of a storage that several share, once."""
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for _, each in tensors_in(tree)}
    return sum(storages.values())


def difference(one: Any, other: Any, path: Path = ()) -> Path | None:
    """Return the first place where two trees differ, None where they are bit-equal."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return None if same_bits(one, other) else path
    if isinstance(one, Mapping) or _is_sequence(one):
        theirs, ours = dict(entries(other)), dict(entries(one))
        if theirs.keys() != ours.keys():
            return path
        found = (difference(ours[key], theirs[key], (*path, key)) for key in ours)
        return next((each for each in found if each is not None), None)
    return None if type(one) is type(other) and (one == other or one != one) else path


def same_bits(one: Any, other: Any) -> bool:
    """Tell whether two tensors have the same shape, dtype and bits, those of NaNs too."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def written(path: Path) -> str:
    """Return a place as a person reads it."""
    return ".".join(map(str, path)) or "the checkpoint itself"
