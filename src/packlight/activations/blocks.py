"""Finds the blocks of a model: the parts that a choice can be made for.

PyTorch leaves this to the user (`checkpoint` takes a function, FSDP a list of classes). The idea: walk down from the
root and stop where going deeper would split what repeats. A child that has a sibling of its own class is a block
(decoder layers, residual blocks); a child without repeated parts inside is a block too (a stem, a head); other children
are walked into. A flat `nn.Sequential` of primitive layers has no such child, so it is cut into about sqrt(n) runs of
layers, each beginning at a layer with a weight matrix (Chen et al. 2016, arXiv 1604.06174, section 4.2).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """A module, or a run of layers `[start, stop)` of an `nn.Sequential`.

    Attributes:
        path: its name in the model, such as "layers.3" or "features[4:8]".
        module_path: the path of the module, of the `nn.Sequential` for a run.
        start, stop: the run's bounds; None for a whole module.
    """

    path: str
    module_path: str
    start: int | None = None
    stop: int | None = None


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of a model in the order in which they are registered; none lies inside another."""
    seen: set[int] = set()
    if _is_flat(model):
        return _runs(model, "")
    return [block for block in _walk(model, "", seen)]


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[Block]:
    children = [(name, child) for name, child in module.named_children() if id(child) not in seen]
    for name, child in children:
        seen.add(id(child))
        path = f"{prefix}{name}"
        num_siblings = sum(type(other) is type(child) for _, other in children)
        if _is_flat(child) and num_siblings == 1:
            yield from _runs(child, path)
        elif _is_block(child, num_siblings, in_container=isinstance(module, _CONTAINERS)):
            yield Block(path, path)
        else:
            yield from _walk(child, f"{path}.", seen)


def _is_block(child: nn.Module, num_siblings: int, *, in_container: bool) -> bool:
    if isinstance(child, nn.ModuleList | nn.ModuleDict):
        return False
    repeated = _most_repeated(child)
    if isinstance(child, nn.Sequential):
        return repeated < 2
    return repeated < 2 or (num_siblings >= 2 and (in_container or num_siblings >= repeated))


def _most_repeated(module: nn.Module) -> int:
    """Return the most children of one composite class that any module inside has."""
    most = 0
    for inner in module.modules():
        kinds = [type(child) for child in inner.children() if next(child.children(), None) is not None]
        most = max(most, max((kinds.count(kind) for kind in set(kinds)), default=0))
    return most


def _is_flat(module: nn.Module) -> bool:
    """Tell whether a module is a long `nn.Sequential` of primitive layers."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    return all(next(child.children(), None) is None for child in module) and len(_run_starts(module)) >= 4


def _run_starts(module: nn.Sequential) -> list[int]:
    return [
        position
        for position, child in enumerate(module)
        if any(parameter.dim() >= 2 for parameter in child.parameters())
    ]


def _runs(module: nn.Module, path: str) -> list[Block]:
    assert isinstance(module, nn.Sequential)
    starts = _run_starts(module)
    length = math.isqrt(len(starts) - 1) + 1
    cuts = [0, *starts[length::length], len(module)]
    return [Block(f"{path}[{start}:{stop}]", path, start, stop) for start, stop in itertools.pairwise(cuts)]
