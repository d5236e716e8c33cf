"""Chooses how ranks share a model's states, together with everything else that a plan chooses.

DeepSpeed and FSDP2 leave the stage to the user, who learns by running out of memory, or never, that a slower one was
not needed. Here one profile of the whole model answers for each stage: it is seen as a rank sees it (`sharded.py`),
communication is added that compute does not hide, and the fastest plan that fits is taken. What states take under many
ranks is little already, so low-bit formats are not chosen there: they would save nothing that is needed.

    time      forward    the longer of compute and the gathering of parameters
              backward   the longer of compute and gathering and reducing
              step       compute, then what is gathered after it (ZeRO-1 and -2)

Of a collective, a rank sends (ranks - 1) / ranks of the tensor's bytes to its neighbour in a ring, twice in an
all-reduce (Rajbhandari et al. 2020, arXiv 1910.02054, section 7).
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from packlight.activations.blocks import find_blocks
from packlight.budget import BudgetError, format_bytes, least_of
from packlight.planner.cost import Cost, StepCost
from packlight.planner.cut import cut_of
from packlight.planner.known_hardware import Hardware
from packlight.planner.outcome import beside_plain, plain_cost
from packlight.planner.request import World
from packlight.planner.sharded import on_rank, state_bytes
from packlight.ranks import Sharded, ShardingRow
from packlight.records import Plan
from packlight.sharding import Sharding, Weight, fsdp, weights_of
from packlight.sharding.ddp import ddp_sharding
from packlight.sharding.stages import ZeroOptions, zero_sharding
from packlight.step import Profile

# An assumption: NCCL starts a collective over a few ranks in 10 to 30 us.
MESSAGE_SECONDS = 20e-6
"""What a collective takes besides its bytes."""

BUCKET_ELEMENTS = 50_000_000
"""`reduce_bucket_size` and the prefetch of stage 3 in configs that packlight makes: a tenth of DeepSpeed's own."""

LIVE_ELEMENTS = 100_000_000
"""`stage3_max_live_parameters` and `stage3_max_reuse_distance`: of DeepSpeed's own, a tenth."""

IN_SIXTEEN_BITS = (
    "in 16 bits DeepSpeed steps fp32 copies of the parameters, DDP and FSDP2 the parameters themselves, which trains "
    "differently; --engine leaves one of them"
)


NO_DDP = "DDP is left out: it has no precision of its own, and a script's autocast is planned for without --precision"


@dataclass(frozen=True)
class Way:
    """A sharding that may be chosen, and how to ask an engine for it."""

    sharding: Sharding
    asked: Sharded


def ways(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], world: World) -> list[Way]:
    """Return the shardings of a model that may be chosen, the least communication first."""
    weights, num_ranks = weights_of(model, optimizers), world.num_ranks
    used = _used(weights, world)
    dtype = str(next((each.dtype for each in used), torch.float32)).removeprefix("torch.")
    made = functools.partial(Sharded, num_ranks=num_ranks, dtype=dtype, precision=world.precision or "")
    found = list[Way]()
    if world.engine in (None, "ddp") and world.precision is None:
        found.append(Way(ddp_sharding(weights, num_ranks=num_ranks), made("ddp", 0)))
    for stage in range(4) if world.engine == "zero" else range(1, 4) if world.engine is None else ():
        options = zero_options(stage, num_ranks, numel=sum(weight.numel for weight in weights))
        found.append(Way(zero_sharding(used, options), made("zero", stage, options=_sizes(options))))
    for keeps, offloads in itertools.product((True, False), repeat=2) if world.engine in (None, "fsdp") else ():
        units = _units(model)
        cuts = fsdp.planned_cuts(weights, units, keeps=keeps, gathered_dtype=world.param_dtype)
        sharding = fsdp.sharding_of(cuts, num_ranks=num_ranks, offloads=offloads)
        asked = made("fsdp", sharding.stage, units=tuple(units), keeps=keeps, offloads=offloads)
        found.append(Way(sharding, asked))
    return found


def _used(weights: Sequence[Weight], world: World) -> list[Weight]:
    """Return weights in the dtype in which they are used."""
    dtype = world.param_dtype
    if dtype is None:
        return list(weights)
    others = {str(each.dtype) for each in weights if each.is_trained and each.dtype != torch.float32}
    if others:
        raise ValueError(f"precision {world.precision} is of fp32 parameters; some are {', '.join(sorted(others))}")
    return [replace(each, dtype=dtype) if each.dtype.is_floating_point else each for each in weights]


def solver_in(
    world: World,
    *,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    hardware: Hardware | None,
    solver: Callable[[Profile], Plan],
) -> Callable[[Profile], Plan]:
    """Return what makes a plan for a rank of a world, from the profile of the whole model.

    Args:
        world: the ranks.
        model: the module that is trained.
        optimizers: its optimisers.
        hardware: the device of each rank; None for the one at hand.
        solver: makes a plan for a profile.

    Returns:
        A function of a profile; it raises BudgetError where nothing fits.

    Raises:
        ValueError: the model is cut over processes already, so its profile is a rank's.
    """
    if cut_of(model) is not None:
        raise ValueError(
            "the model's states are cut over processes already, and world plans how to cut a whole one; leave it out, "
            "or give the model before fully_shard or deepspeed.initialize"
        )
    found, link = ways(model, optimizers, world), world.link(hardware)
    return functools.partial(fastest_sharding, found=found, link=link, solver=solver)


def zero_options(stage: int, num_ranks: int, *, numel: int) -> ZeroOptions:
    """Return what packlight asks of DeepSpeed's ZeRO for a model of so many parameters."""
    bucket = min(BUCKET_ELEMENTS, numel)  # DeepSpeed makes buckets of the size it is told, whatever the model's
    return ZeroOptions(
        stage,
        num_ranks,
        reduce_bucket_elements=bucket,
        overlaps=stage in (1, 2),
        prefetch_elements=bucket,
        live_elements=LIVE_ELEMENTS,
    )


def _sizes(options: ZeroOptions) -> dict[str, int]:
    return {
        "reduce_bucket_elements": options.reduce_bucket_elements,
        "prefetch_elements": options.prefetch_elements,
        "live_elements": options.live_elements,
        "persistent_elements": options.persistent_elements,
        "sub_group_elements": options.sub_group_elements,
    }


def _units(model: nn.Module) -> list[str]:
    """Return the blocks that `fully_shard` is to be applied to: those of a class of which there are several.

    Single layers are units only where there are no larger ones. Tied parameters have to be in one unit, so a block that
    shares some with another module is left to the root.
    """
    blocks = [block.module_path for block in find_blocks(model) if block.start is None and block.module_path]
    modules = {path: model.get_submodule(path) for path in blocks}
    kinds = [type(module) for module in modules.values()]
    several = {path: at for path, at in modules.items() if kinds.count(type(at)) > 1 and not _is_tied(model, path)}
    larger = [path for path, module in several.items() if any(True for _ in module.children())]
    return larger or list(several)


def _is_tied(model: nn.Module, path: str) -> bool:
    """Tell whether a parameter inside a module has another name outside of it, too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    inside = f"{path}."
    return any(len({name.startswith(inside) for name in each}) > 1 for each in names.values())


def seen_by_rank(step: Profile, sharding: Sharding, link: float) -> Profile:
    """Return the step on a rank, with the communication that compute does not hide."""
    seconds = _times(step, sharding, link)
    made = on_rank(step, sharding)
    return replace(
        made,
        seconds=made.seconds + seconds.forward + seconds.backward,
        forward_seconds=made.forward_seconds + seconds.forward,
        optimizers=tuple(replace(each, seconds=each.seconds + seconds.after) for each in made.optimizers),
    )


@dataclass(frozen=True)
class _Times:
    """Seconds that communication adds to forward, to backward and after the optimiser's step; and all of it alone."""

    forward: float
    backward: float
    after: float
    alone: float


def _times(step: Profile, sharding: Sharding, link: float) -> _Times:
    latency = MESSAGE_SECONDS * sharding.num_messages * (sharding.num_ranks > 1)
    gather, reduce, after = (
        each / link for each in (sharding.gathered_bytes, sharding.sent_bytes, sharding.after_bytes)
    )
    if sharding.host_bytes and step.link is not None:  # copies of one unit go on beside the messages of another
        gather = max(gather, sharding.host_in_bytes / step.link.in_bytes_per_second)
        reduce = max(reduce, sharding.host_out_bytes / step.link.out_bytes_per_second)
    kept = all(unit.is_kept for unit in sharding.units)
    in_forward = gather if kept and sharding.engine == "fsdp" else gather / 2
    compute = step.seconds - step.forward_seconds
    return _Times(
        forward=max(0.0, in_forward - step.forward_seconds),
        backward=max(0.0, gather - in_forward + reduce + latency - compute),
        after=after,
        alone=gather + reduce + after + latency,
    )


def fastest_sharding(step: Profile, found: Sequence[Way], *, link: float, solver: Callable[[Profile], Plan]) -> Plan:
    """Choose among shardings.

    Args:
        step: the profile of the whole model.
        found: the shardings.
        link: what a rank sends to the next, in bytes a second.
        solver: makes a plan for a profile.

    Returns:
        The fastest plan, whose `sharding` has a row for each that was weighed.

    Raises:
        BudgetError: nothing fits under any of them; it names the smallest budget that would.
    """
    every = [(way, seen_by_rank(step, way.sharding, link)) for way in found]
    seen = [(way, rank) for way, rank in every if _is_possible(way.sharding, rank)]
    tried = [(way, rank, plain_cost(StepCost(rank))) for way, rank in sorted(seen, key=lambda each: each[1].seconds)]
    made, errors = dict[int, Plan](), dict[str, BudgetError]()
    for at, (way, rank, as_it_is) in enumerate(tried):
        best = min((plan.estimate.step_seconds for plan in made.values()), default=None)
        if best is not None and as_it_is.seconds >= best:
            continue  # it cannot be faster
        try:
            made[at] = solver(rank)
        except BudgetError as error:
            errors[way.sharding.name] = error
    if not made:
        raise BudgetError(_refusal(errors), smallest_bytes=least_of(errors.values()).smallest_bytes)
    chosen = min(made, key=lambda at: made[at].estimate.step_seconds)  # of several the one with least communication
    plan = made[chosen]
    rows = tuple(
        replace(_row(way.sharding, step, rank, as_it_is=as_it_is, link=link, plan=made.get(at)), is_chosen=at == chosen)
        for at, (way, rank, as_it_is) in enumerate(tried)
    )
    asked = replace(tried[chosen][0].asked, link_bytes_per_second=link, rows=rows, binds=_binds(plan, rows[chosen]))
    return replace(
        beside_plain(plan, plain_cost(StepCost(step))), sharding=asked, notes=(*plan.notes, *_notes(asked, found))
    )


def _notes(asked: Sharded, found: Sequence[Way]) -> list[str]:
    """Say what a reader should know of a choice among several engines."""
    if len({way.sharding.engine for way in found}) == 1:
        return []
    if asked.precision:
        return [NO_DDP]
    return [IN_SIXTEEN_BITS] * (asked.dtype in ("bfloat16", "float16"))


def _is_possible(sharding: Sharding, seen: Profile) -> bool:
    """Tell whether there is the host memory for a rank, and a kernel that steps there, where a sharding wants them."""
    return not sharding.host_bytes or any(map(seen.takes, seen.optimizers))


def _refusal(errors: Mapping[str, BudgetError]) -> str:
    """Say what each sharding would need."""
    needs = ", ".join(f"{format_bytes(error.smallest_bytes or 0)} under {name}" for name, error in errors.items())
    return f"{least_of(errors.values())}, on more ranks, or on other hardware; on each rank the least is {needs}"


def _row(
    sharding: Sharding, step: Profile, seen: Profile, *, as_it_is: Cost, link: float, plan: Plan | None
) -> ShardingRow:
    num, times = step.num_microbatches, _times(step, sharding, link)
    gradients = sum(each.num_bytes for each in seen.storages if each.is_gradient and each.died >= seen.num_events)
    return ShardingRow(
        name=sharding.name,
        parameter_bytes=sharding.parameter_bytes + sharding.master_bytes,
        gradient_bytes=gradients + seen.resident_bytes.get("gradients", 0),
        state_bytes={each.state_format: state_bytes(each, sharding) for each in step.optimizers if not each.host_bytes},
        buffer_bytes=sharding.buffer_bytes + sharding.persistent_bytes + sharding.backward_bytes,
        plain_peak_bytes=as_it_is.peak_bytes,
        sent_bytes=num * (sharding.gathered_bytes + sharding.sent_bytes) + sharding.after_bytes,
        communication_seconds=num * (times.alone - times.after) + times.after,
        exposed_seconds=num * (times.forward + times.backward) + times.after,
        step_seconds=None if plan is None else plan.estimate.step_seconds,
        host_bytes=sharding.host_bytes,
    )


def _binds(plan: Plan, row: ShardingRow) -> str:
    """Say what stands against a faster step."""
    estimate = plan.estimate
    largest = max(estimate.peak_by_category, key=lambda name: estimate.peak_by_category[name])
    if any(choice.seconds > 0 for choice in plan.choices):
        return f"on each rank memory binds: {largest.replace('_', ' ')} take most of its peak"
    if row.exposed_seconds > 0.05 * estimate.step_seconds:
        return f"the link binds: {row.exposed_seconds:.3g} s of a step wait for it"
    return "compute binds: everything fits, and communication is hidden"
