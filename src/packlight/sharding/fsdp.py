"""What a rank holds under torch's `fully_shard` (FSDP2), for a model that is cut already or is to be; and cutting it.

FSDP2 frees gathered parameters by making their storages empty, keeps buffers of collectives alive until the next one
may use their memory, and tells none of it before the step has run. From its code (torch 2.11 to 2.13,
torch/distributed/fsdp/_fully_shard), for a unit of gathered size G:

    forward     1 buffer of the all-gather, G           2 parameters, G; let go when the unit has run
                  (1 is held until the next unit has its own)
    backward    3 buffer, then parameters, G            4 buffer of the next unit, gathered ahead, G of that
                5 whole gradients                       6 parameters go; buffer of the reduce-scatter, G; then 5 go
                  (6 is held until the next unit has its own)   7 this rank's share of gradients stays

The root's parameters stay gathered from forward to backward. Shares are rows, as many on each rank, padded with zeros.
"""

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from packlight.ranks import PRECISIONS
from packlight.records import Plan
from packlight.sharding.bare import bare
from packlight.sharding.shards import Sharding, Share, Unit, Weight


@dataclass(frozen=True)
class Cut:
    """Parameters that `fully_shard` has put, or would put, together.

    Attributes:
        module: the path of the module; "" for the root.
        weights: its parameters that no unit inside has.
        is_kept: whether they stay gathered from forward until backward.
        gathered_dtype: in which they are gathered; None: their own.
        reduced_dtype: in which gradients are reduced; None: that of the gradients.
        casts_inputs: whether what the module is called with is cast to `gathered_dtype`.
        output_dtype: to which what it returns is cast; None: not.
    """

    module: str
    weights: tuple[Weight, ...]
    is_kept: bool
    gathered_dtype: torch.dtype | None = None
    reduced_dtype: torch.dtype | None = None
    casts_inputs: bool = True
    output_dtype: torch.dtype | None = None


def sharding_of(cuts: Sequence[Cut], *, num_ranks: int, offloads: bool = False) -> Sharding:
    """Return what a rank holds.

    Args:
        cuts: the units, in the order in which forward reaches them; the root's where it stands in the model.
        num_ranks: over which rows are cut.
        offloads: whether shares are in host memory, as `CPUOffloadPolicy` asks, and stepped there.
    """
    weights = [weight for cut in cuts for weight in cut.weights]
    units = tuple(_unit(cut, num_ranks, offloads=offloads) for cut in cuts if cut.weights)
    share = _share(weights, num_ranks)
    trained = sorted((weight for weight in weights if weight.is_trained), key=lambda weight: weight.name)
    widening = _widening(cuts)
    held, returned = (sum(_share_bytes(weight, num_ranks) for weight in each) for each in (weights, trained))
    return Sharding(
        engine="fsdp",
        stage=2 if all(cut.is_kept for cut in cuts) else 3,
        num_ranks=num_ranks,
        parameter_bytes=0 if offloads else held,
        persistent_bytes=units[-1].extra_bytes if units else 0,
        gradient_share=0.0 if offloads else share * widening,
        widening=widening,
        state_share=share,
        shares=(tuple(Share(each.name, each.shape, _rows(each, num_ranks), each.dtype) for each in trained),),
        units=units,
        sent_bytes=(sum(unit.gradient_bytes for unit in units) - held * offloads) * (num_ranks - 1) // num_ranks,
        gathered_bytes=sum(unit.gathered_bytes * (1 if unit.is_kept else 2) for unit in units)
        * (num_ranks - 1)
        // num_ranks,
        num_messages=sum(2 if unit.is_kept else 3 for unit in units),
        host_bytes=(held + returned) * offloads,
        host_in_bytes=sum(_cut_bytes(cut, num_ranks) * (1 if cut.is_kept else 2) for cut in cuts) * offloads,
        host_out_bytes=returned * offloads,
    )


def _cut_bytes(cut: Cut, num_ranks: int) -> int:
    return sum(_share_bytes(weight, num_ranks) for weight in cut.weights)


def _share_bytes(weight: Weight, num_ranks: int) -> int:
    return _padded(weight, num_ranks) * weight.dtype.itemsize


def _unit(cut: Cut, num_ranks: int, *, offloads: bool) -> Unit:
    numels = [(_padded(weight, num_ranks) * num_ranks, weight) for weight in cut.weights]
    gathered = sum(numel * (cut.gathered_dtype or weight.dtype).itemsize for numel, weight in numels)
    reduced = sum(
        numel * (cut.reduced_dtype or cut.gathered_dtype or weight.dtype).itemsize
        for numel, weight in numels
        if weight.is_trained
    )
    several, copied = num_ranks > 1, _cut_bytes(cut, num_ranks) * offloads  # what is on its way from or to the host
    return Unit(cut.module, gathered, gathered * several + copied, reduced * several + copied, cut.is_kept)


def _widening(cuts: Sequence[Cut]) -> float:
    """Return how many times the bytes of backward's gradients those take that are kept, in the parameters' dtype."""
    trained = [(cut, weight) for cut in cuts for weight in cut.weights if weight.is_trained]
    made = sum(weight.numel * (cut.gathered_dtype or weight.dtype).itemsize for cut, weight in trained)
    return sum(weight.nbytes for _, weight in trained) / max(1, made)


def _rows(weight: Weight, num_ranks: int) -> tuple[int, ...]:
    """Return the shape of the first rank's rows, which has the most."""
    if not weight.shape:
        return ()
    return -(-weight.shape[0] // num_ranks), *weight.shape[1:]


def _padded(weight: Weight, num_ranks: int) -> int:
    """Return the elements that each rank holds of a parameter, with the zeros that fill it up."""
    return torch.Size(_rows(weight, num_ranks)).numel()


def _share(weights: Sequence[Weight], num_ranks: int) -> float:
    trained = [weight for weight in weights if weight.is_trained]
    whole = sum(weight.numel for weight in trained)
    return sum(_padded(weight, num_ranks) for weight in trained) / max(1, whole)


def planned_cuts(
    weights: Sequence[Weight], modules: Iterable[str], *, keeps: bool, gathered_dtype: torch.dtype | None = None
) -> list[Cut]:
    """Return the units of a model that is to be cut at some of its modules, and at its root.

    Args:
        weights: of the model.
        modules: paths of the modules, none inside another.
        keeps: whether units stay gathered from forward until backward, as `reshard_after_forward=False` asks.
        gathered_dtype: in which they are gathered, and gradients are reduced; None: their own.
    """
    paths = list(modules)
    inside: dict[str, list[Weight]] = {path: [] for path in ["", *paths]}
    for weight in weights:
        inside[next((path for path in paths if weight.name.startswith(f"{path}.")), "")].append(weight)
    return [
        Cut(path, tuple(own), is_kept=keeps or not path, gathered_dtype=gathered_dtype)
        for path, own in inside.items()
        if own
    ]


# Models that are cut already


def found_cuts(model: nn.Module) -> tuple[list[Cut], int]:
    """Return the units of a model that `fully_shard` was applied to, and over how many ranks rows are cut.

    Raises:
        ValueError: it is cut in a way that is not planned for: over several meshes or with replicas, along other axes
            than rows, or with shares in a GPU's host memory.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cuts, sizes = list[Cut](), set[int]()
    paths = [path for path, _ in _units(model)]
    for path, module in _units(model):
        is_root = not any(path.startswith(f"{other}.") or not other for other in paths if other != path)
        state = module._get_fsdp_state()
        for group in _groups(state):
            own = [_weight(each, names) for each in group.fsdp_params]
            _refuse_others(group)
            sizes.add(_ranks_of(group))
            keeps = not group._reshard_after_forward or (
                is_root and getattr(state, "_auto_reshard_after_forward", True)
            )
            policy = group.mp_policy
            casts = bool(policy.cast_forward_inputs), policy.output_dtype
            cuts.append(Cut(path, tuple(own), bool(keeps), policy.param_dtype, policy.reduce_dtype, *casts))
    if len(sizes) != 1:
        raise ValueError(f"fully_shard cut parts of the model over {sorted(sizes)} ranks; wanted one number for all")
    return cuts, sizes.pop()


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `fully_shard` was applied to a model or to a module in it."""
    return any(True for _ in _units(model))


def process_group(model: nn.Module) -> Any:
    """Return the process group over which rows are cut."""
    _, module = next(_units(model))
    return _groups(module._get_fsdp_state())[0].mesh_info.shard_process_group


def _units(model: nn.Module) -> Iterator[tuple[str, Any]]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has not imported it, has cut nothing
    kinds: tuple[type, ...] = (fsdp.FSDPModule,) if fsdp is not None else ()
    for path, module in model.named_modules() if kinds else ():
        if isinstance(module, kinds):
            yield path, module


def _groups(state: Any) -> list[Any]:
    """Return a unit's groups of parameters: one, and several with several meshes (torch 2.13)."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return list(groups)


def _refuse_others(group: Any) -> None:
    if getattr(group.mesh_info, "replicate_process_group", None) is not None:
        raise ValueError(
            "fully_shard replicates shares over a second axis of the mesh (HSDP), which is not planned for; wanted a "
            "mesh of one axis"
        )
    if type(group.offload_policy).__name__ == "CPUOffloadPolicy" and group.device.type != "cpu":
        raise ValueError(
            "fully_shard keeps shares in host memory (CPUOffloadPolicy), which is not planned for yet; leave it out"
        )


def _ranks_of(group: Any) -> int:
    return int(getattr(group.mesh_info, "shard_mesh_size", 1))


def _weight(fsdp_param: Any, names: Mapping[int, str]) -> Weight:
    sharded = fsdp_param.sharded_param
    placement = getattr(fsdp_param, "fsdp_placement", None)
    if placement is not None and placement.dim != 0:
        raise ValueError(f"a parameter is cut along axis {placement.dim}; plans are made for rows, axis 0")
    name = names.get(id(sharded), "")
    return Weight(name, tuple(fsdp_param._orig_size), sharded.dtype, bool(sharded.requires_grad))


@contextmanager
def hidden(model: nn.Module) -> Iterator[None]:
    """Take `fully_shard` off a model's modules for a while, so that a copy of it is of ordinary modules.

    Parameters stay cut; whoever copies puts whole ones in their place.
    """
    found = [(module, type(module), module._get_fsdp_state()) for _, module in _units(model)]
    if not found:
        yield
        return
    states = {id(state) for _, _, state in found}

    def is_of_state(hook: Any) -> bool:
        is_fsdp2s = getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
        return is_fsdp2s or id(getattr(hook, "__self__", None)) in states

    try:
        for module, kind, _ in found:
            module.__class__ = kind.__bases__[1]
        with bare(model, is_engines_key=lambda key: key.startswith("__composable_api"), is_engines_hook=is_of_state):
            yield
    finally:
        for module, kind, _ in found:
            module.__class__ = kind


def cast(model: nn.Module, cuts: Iterable[Cut]) -> list[RemovableHandle]:
    """Let a copy of a model cast what its units take and return, as `fully_shard` does under mixed precision."""

    def to(dtype: torch.dtype, value: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, value)

    handles = []
    for cut in cuts:
        module, taken, returned = model.get_submodule(cut.module), cut.gathered_dtype, cut.output_dtype
        if taken is not None and cut.casts_inputs:
            before = functools.partial(lambda dtype, _, args, kwargs: (to(dtype, args), to(dtype, kwargs)), taken)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        if returned is not None:
            after = functools.partial(lambda dtype, _module, _args, output: to(dtype, output), returned)
            handles.append(module.register_forward_hook(after))
    return handles


# Models that are to be cut


def shard(model: nn.Module, plan: Plan, *, mesh: Any = None, **options: Any) -> None:
    """Cut a model as a plan says.

    Args:
        model: the module that is trained; changed in place. Make its optimiser after this.
        plan: made with `world`, with FSDP2 chosen.
        mesh: the device mesh; None for all ranks.
        options: of `fully_shard` besides; `mp_policy` and `offload_policy` are the plan's where they are not given.

    Raises:
        ValueError: the plan shares no states by FSDP2, the model has no such module, or is cut already.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    sharded = plan.sharding
    if sharded is None or sharded.engine != "fsdp":
        came = "is for one rank" if sharded is None else f"shares states by {sharded.engine}"
        raise ValueError(f'the plan {came}; wanted one made with world and engine "fsdp"')
    if is_sharded(model):
        raise ValueError("fully_shard was applied to the model already; give one that it was not applied to")
    paths = dict(model.named_modules())
    missing = [path for path in sharded.units if path not in paths]
    if missing:
        raise ValueError(f"the model has no module {missing[0]!r}; was the plan made for another model?")
    shared: dict[str, Any] = {} if mesh is None else {"mesh": mesh}
    if sharded.precision:
        shared["mp_policy"] = MixedPrecisionPolicy(param_dtype=getattr(torch, PRECISIONS[sharded.precision]))
    if sharded.offloads:
        shared["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    shared |= options
    for path in sharded.units:
        fully_shard(paths[path], reshard_after_forward=not sharded.keeps, **shared)
    fully_shard(model, **shared)
