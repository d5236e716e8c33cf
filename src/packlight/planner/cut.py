"""Models whose states are cut over processes already, by FSDP2 or DeepSpeed: what is whole of them, what is here.

A session meets a model as the script made it. Its parameters may be shares, its modules full of an engine's hooks, and
its optimiser may step something else than its parameters. Here the engines are asked, each in its own words.
"""

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from packlight.optim.flat import Flat, Origin, flat_layout
from packlight.planner.agree import Agreement
from packlight.planner.loop import parameters_of, unwrapped
from packlight.planner.tensors import storage_bytes
from packlight.sharding import Sharding, fsdp

if TYPE_CHECKING:
    from packlight.sharding.zero import Engine

_replicas: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
_engines: "weakref.WeakKeyDictionary[nn.Module, Engine]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Cut:
    """How a model at hand is cut.

    Attributes:
        sharding: what the rank with the largest share holds, beside what is there before the first step.
        whole: the shape of each parameter that is not whole here, and the dtype in which it is used, by its id.
        resident: bytes by category that are here.
        group: the process group over which it is cut.
        units: of FSDP2, which cast what they take and return.
    """

    sharding: Sharding
    whole: Mapping[int, tuple[tuple[int, ...], torch.dtype]]
    resident: Mapping[str, int]
    group: Any
    units: tuple[fsdp.Cut, ...] = ()


@dataclass(frozen=True)
class Used:
    """How a model's parameters are used, where that is not as they are.

    Attributes:
        whole: the shape and the dtype of each by its id.
        units: what casts its arguments and results.
    """

    whole: Mapping[int, tuple[tuple[int, ...], torch.dtype]]
    units: tuple[fsdp.Cut, ...] = ()

    def cast(self, copied: nn.Module) -> list[RemovableHandle]:
        """Let a copy cast what its modules take and return as the engine does; return what ends that."""
        return fsdp.cast(copied, self.units)


def used_in(model: nn.Module, cut: Cut | None, *, dtype: torch.dtype | None) -> Used:
    """Return how a model's parameters are used.

    Args:
        model: the model.
        cut: how it is cut; None for one that is whole.
        dtype: to which an engine will cast floating-point parameters and arguments of a whole one; None: not at all.
    """
    if cut is not None:
        return Used(cut.whole, cut.units)
    if dtype is None:
        return Used({})
    floating = (each for each in model.parameters() if each.is_floating_point())
    return Used({id(each): (tuple(each.shape), dtype) for each in floating}, (fsdp.Cut("", (), True, dtype),))


def model_of(module: nn.Module) -> nn.Module:
    """Return the model inside DeepSpeed's engine, which is remembered, or inside torch's own data-parallel wrapper."""
    if "deepspeed.runtime.engine" in sys.modules:
        from packlight.sharding import zero

        if zero.is_engine(module):
            engine = zero.Engine(module)
            _engines[engine.model] = engine
            return engine.model
    model = unwrapped(module)
    if model is not module:
        _replicas[model] = module.process_group
    return model


def agreement_of(model: nn.Module) -> Agreement:
    """Return with whom plans for a model are agreed on: ranks that share its states, or have replicas of it.

    Raises:
        ValueError: it is cut in a way that plans are not made for.
    """
    cut = cut_of(model)
    return Agreement(cut.group) if cut is not None else Agreement(_replicas.get(model), is_shared=False)


def cut_of(model: nn.Module) -> Cut | None:
    """Return how a model is cut; None for one that is whole.

    Raises:
        ValueError: it is cut in a way that plans are not made for.
    """
    engine = _engines.get(model)
    if engine is not None:
        return _cut_by_deepspeed(model, engine)
    if not fsdp.is_sharded(model):
        return None
    cuts, num_ranks = fsdp.found_cuts(model)
    dtypes = {weight.name: cut.gathered_dtype or weight.dtype for cut in cuts for weight in cut.weights}
    whole = {id(each): (tuple(each.shape), dtypes.get(name, each.dtype)) for name, each in model.named_parameters()}
    held = {"parameters": storage_bytes(model.parameters())}
    return Cut(fsdp.sharding_of(cuts, num_ranks=num_ranks), whole, held, fsdp.process_group(model), tuple(cuts))


def _cut_by_deepspeed(model: nn.Module, engine: "Engine") -> Cut:
    weights = {weight.name: weight for weight in engine.weights()}
    whole = {id(each): (weights[name].shape, each.dtype) for name, each in model.named_parameters()}
    sharding = replace(engine.sharding(), buffer_bytes=0)  # what it would say lives by now, and is counted as such
    if sharding.stage == 3:
        sharding = replace(sharding, kept_gradient_bytes=0)
    return Cut(sharding, whole, {"parameters": storage_bytes([*model.parameters(), *engine.flats()])}, engine.group)


def trained_by(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield the parameters that an optimiser trains; under ZeRO it steps others in their place."""
    yield from parameters_of(optimizer)
    for engine in _engines_of(optimizer):
        for group in engine.groups():
            yield from group


def stepped_by(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Return the tensors that optimisers step."""
    found = {id(each): each for optimizer in optimizers for each in parameters_of(optimizer)}
    for optimizer in optimizers:
        found |= {id(each): each for engine in _engines_of(optimizer) for each in engine.flats()}
    return list(found.values())


def num_calls(optimizer: torch.optim.Optimizer) -> int:
    """Return how often an optimiser's `step` is called in a step: ZeRO does it for each flat partition."""
    return max([1, *(engine.num_calls() for engine in _engines_of(optimizer))])


def flats_of(optimizer: torch.optim.Optimizer, formats: Mapping[torch.Tensor, str]) -> dict[torch.Tensor, Flat]:
    """Return how the states of an optimiser's flat partitions are to lie.

    Args:
        optimizer: an optimiser.
        formats: of parameters of the model; what is not named stays fp32.

    Returns:
        From each partition that has a parameter in another format than fp32; nothing where it steps no partitions.
    """
    found = {}
    for flat, params in (pair for engine in _engines_of(optimizer) for pair in engine.partitions()):
        origins = [Origin.of(param, formats.get(param, "fp32")) for param in params]
        if any(origin.state_format not in ("fp32", "as is") for origin in origins):
            found[flat] = flat_layout(flat, origins)
    return found


def _engines_of(optimizer: torch.optim.Optimizer) -> list["Engine"]:
    return [engine for engine in _engines.values() if engine.optimizer is optimizer]


@contextmanager
def without_engine(model: nn.Module) -> Iterator[None]:
    """Take an engine's hooks and states off a model's modules for a while, so that they can be copied.

    Its optimiser has the model's own parameters meanwhile, and no states.
    """
    engine = _engines.get(model)
    with fsdp.hidden(model), engine.hidden() if engine is not None else nullcontext():
        yield
