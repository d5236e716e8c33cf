"""Plans for a model that somebody has in hand: profile, and solve.

A plan needs to know what lives beside the model, what the device has, and which tier may be used. Here that is found
out for a model, its optimiser and a batch; for a script that is running, `making.py` does it.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, Required, TypedDict, Unpack

import torch
from torch import nn

from packlight.budget import Budget, format_bytes
from packlight.control_groups import host_memory
from packlight.planner.beside import other_bytes
from packlight.planner.cut import agreement_of
from packlight.planner.hardware import measure
from packlight.planner.known_hardware import named
from packlight.planner.links import find_link, unused
from packlight.planner.loop import Loss, Seen, listed
from packlight.planner.microbatches import NOT_SPLIT, fastest_split, numbers, split
from packlight.planner.profile import profile
from packlight.planner.released import solve_releasing
from packlight.planner.request import World
from packlight.planner.solve import solve
from packlight.planner.world import solver_in
from packlight.records import Plan
from packlight.step import Profile


def plan(
    model: nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer | None,
    *,
    budget: int | str | Budget,
    loss: Loss | None = None,
    host_budget: int | str | None = None,
    disk: str | None = None,
    exact: bool = False,
    release_gradients: bool = False,
    max_microbatches: int = 1,
    hardware: str | None = None,
    world: int | World | None = None,
) -> Plan:
    """Decide how a training step fits a byte budget; changes nothing of the caller's.

    Nothing of the model runs, but for one forward (for each number of microbatches) where shapes or branches depend on
    values; see `profile`.

    Operators are run alone on the device, on operands of their own, to learn what they take: at most a quarter of the
    memory that is free, for seconds. On a GPU the allocator's peak statistics begin anew.

    Tensors of the script that live on the model's device now (a data set) count as used throughout the step.

    Args:
        model: the module that is trained, on any device (also meta).
        batch: what the model takes: a mapping is `model(**batch)`, a tuple `model(*batch)`, a tensor `model(batch)`.
        optimizer: the optimiser that steps; None for forward and backward alone.
        budget: bytes allowed on the training device at the step's peak: an int, "12GiB", "800MB" or "80%".
        loss: a function of (output, batch) that returns a scalar; None: `output.loss`, or the output if it is a scalar.
        host_budget: bytes allowed in host memory, for what a GPU moves there and for optimiser states that are stepped
            there; taken on a GPU and for named hardware only.
        disk: folder of the disk tier, where tensors wait for backward; None: nothing is moved there.
        exact: only choices that leave every loss and gradient bit-equal.
        release_gradients: parameters may be stepped inside backward, and their gradients freed there: nothing between
            backward and `step` needs them (no clipping, accumulation or GradScaler; nobody logs their norm).
        max_microbatches: a batch may be split into so many parts (a power of two) whose gradients add up, by a loop
            over `handle.microbatches(batch)`, where the loss is a mean over rows; not where `exact` is asked for.
        hardware: the name of the device to plan for ("h100-80g"), instead of the model's; nothing is measured. A share
            is of its memory, and a larger budget is refused, but for a `Budget`: what would run at its speed with that
            much memory.
        world: ranks that train with such a batch each, and share the model's states: the stage of sharding is chosen,
            too, and the budget is each rank's. For a model that is whole here.

    Returns:
        The fastest plan that fits.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that would.
        ValueError: the budget cannot be read, is not positive, or is larger than the device; or there is no hardware of
            this name.
        ProfileError: the step cannot be traced on fake tensors.

    >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(8)])
    >>> made = plan(model, torch.ones(4096, 64), None, budget="20MiB", loss=lambda output, _: output.sum())
    >>> made.estimate.device_peak_bytes <= 20 * 2**20 < made.estimate.plain_peak_bytes
    True
    """
    asked = Asked(
        budget=budget,
        loss=loss,
        host_budget=host_budget,
        disk=disk,
        exact=exact,
        release_gradients=release_gradients,
        max_microbatches=max_microbatches,
        hardware=hardware,
        world=world,
    )
    return profiled(model, batch, optimizer, **asked)[1]


class Asked(TypedDict, total=False):
    """What `plan` is asked for beside the model, its batch and its optimiser; see there."""

    budget: Required[int | str | Budget]
    loss: Loss | None
    host_budget: int | str | None
    disk: str | None
    exact: bool
    release_gradients: bool
    max_microbatches: int
    hardware: str | None
    world: int | World | None


def profiled(
    model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None, **asked: Unpack[Asked]
) -> tuple[Profile, Plan]:
    """Do what `plan` does, and return the profile too, from which the plan can be made once more."""
    with off_meta():
        return _profiled(model, batch, optimizer, **asked)


def _profiled(
    model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None, **asked: Unpack[Asked]
) -> tuple[Profile, Plan]:
    device, hardware, budget = device_of(model), asked.get("hardware"), asked["budget"]
    known = named(hardware)
    unbound = known is not None and isinstance(budget, Budget)
    allowed = Budget.of(budget, total_bytes=None if unbound else memory_bytes(device, hardware))
    beside_bytes = None
    if known is None and device.type != "meta":
        measure(device.type)  # what measuring leaves behind is counted too
        beside_bytes = other_bytes(model, listed(optimizer))
    host_budget, disk = asked.get("host_budget"), asked.get("disk")
    link = find_link(device, host_budget=host_budget, disk=disk, known=known)
    notes = [*unused(device, host_budget=host_budget, disk=disk, known=known)]
    if known is not None and allowed.device_bytes > known.device_bytes:
        notes.append(f"the budget is more than the {format_bytes(known.device_bytes)} that {known.name} has")

    world = asked.get("world")
    ranks = World(world) if isinstance(world, int) else world
    exact, most = asked.get("exact", False), asked.get("max_microbatches", 1)
    tried = [1] if exact else numbers(batch, most)
    notes += [NOT_SPLIT] * (most > 1 and len(tried) == 1)

    @functools.cache
    def step_of(num: int) -> Profile:
        gradients: Literal["step", "none"] = "step" if num > 1 else "none"
        seen = Seen(
            other_bytes=beside_bytes,
            num_microbatches=num,
            gradients=gradients,
            param_dtype=None if ranks is None else ranks.param_dtype,
        )
        part = batch if num == 1 else next(split(batch, num))[0]
        step = profile(model, part, optimizer, loss=asked.get("loss"), seen=seen, hardware=hardware, link=link)
        step = replace(step, notes=(*step.notes, *notes))
        return step if num == 1 else _beside_whole(step, step_of(1), is_cut=device.type == "meta")

    solver: Callable[[Profile], Plan] = functools.partial(
        solve_releasing if asked.get("release_gradients") else solve, budget=allowed, exact=exact
    )
    if ranks is not None:
        solver = solver_in(ranks, model=model, optimizers=listed(optimizer), hardware=known, solver=solver)
    return agreement_of(model).made(lambda: fastest_split(tried, step_of, solver))


def _beside_whole(step: Profile, whole: Profile, *, is_cut: bool) -> Profile:
    """Count the whole batch, which lives while its parts are used; on the meta device a part's fake copy is cut off."""
    missing_bytes = (whole.batch_bytes - step.batch_bytes) * is_cut
    resident = {**step.resident_bytes, "other": step.resident_bytes.get("other", 0) + missing_bytes}
    return replace(step, batch_bytes=whole.batch_bytes, resident_bytes=resident)


def off_meta() -> AbstractContextManager[object]:
    """Let tensors that planning makes have values where the caller's own would be made on the meta device."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def memory_bytes(device: torch.device, hardware: str | None) -> int | None:
    """Return what budgets are held against: a named device's memory, or a device's own; None for the meta device."""
    known = named(hardware)
    if known is not None:
        return known.device_bytes
    return None if device.type == "meta" else device_bytes(device)


def device_bytes(device: torch.device) -> int:
    """Return the size of a device's memory in bytes; the machine's for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory()["MemTotal"]
