"""Finds the fastest plan whose predicted peak fits the budget.

torch's own choices are all or nothing, or a fraction that nobody can relate to bytes. Here every block may be
recomputed and every storage group encoded, for each format of the optimiser's states; an integer program chooses
(`program.py`, `search.py`), the whole line of events judges (`cost.py`), and the fastest result is taken, the exact one
where that costs no time.
"""

import math
from dataclasses import replace
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import nn

from packlight.budget import Budget, BudgetError, format_bytes
from packlight.planner.beside import other_bytes
from packlight.planner.cost import StepCost
from packlight.planner.hardware import measure
from packlight.planner.known_hardware import named
from packlight.planner.links import find_link, unused
from packlight.planner.loop import Loss, Seen, listed
from packlight.planner.options import encodings, moves
from packlight.planner.outcome import plan_of
from packlight.planner.profile import profile
from packlight.planner.search import Search
from packlight.records import Plan
from packlight.step import OptimizerCost, Profile

HEADROOM = 0.01
"""Share of the budget that a plan leaves free, for scalars and lists that a script makes beside the step."""

LOADED_BATCHES = 2
"""On the CPU a data loader's next batches share the device with the step; so many are left room for."""

EXACT_FORMATS = ("fp32", "as is")

WINDOW_GROUPS = 2
"""A tier's window is as large as so many of the largest groups: one that backward uses next, and one on its way."""


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
    hardware: str | None = None,
) -> Plan:
    """Decide how a training step fits a byte budget; runs nothing of the model and changes nothing of the caller's.

    Operators are run alone on the device, on operands of their own, to learn what they take: at most a quarter of the
    memory that is free, for seconds. On a GPU the allocator's peak statistics begin anew.

    Tensors of the script that live on the model's device now (a data set) count as used throughout the step.

    Args:
        model: the module that is trained, on any device (also meta).
        batch: what the model takes: a mapping is `model(**batch)`, a tuple `model(*batch)`, a tensor `model(batch)`.
        optimizer: the optimiser that steps; None for forward and backward alone.
        budget: bytes allowed on the training device at the step's peak: an int, "12GiB", "800MB" or "80%".
        loss: a function of (output, batch) that returns a scalar; None: `output.loss`, or the output if it is a scalar.
        host_budget: bytes allowed in host memory for what a GPU offloads; None: nothing is moved there.
        disk: folder of the disk tier, where tensors wait for backward; None: nothing is moved there.
        exact: only choices that leave every loss and gradient bit-equal.
        hardware: the name of the device to plan for ("h100-80g"), instead of the model's; nothing is measured. A share
            is of its memory, and a larger budget is refused, but for a `Budget`: what would run at its speed with that
            much memory.

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
    asked = Asked(budget=budget, loss=loss, host_budget=host_budget, disk=disk, exact=exact, hardware=hardware)
    return profiled(model, batch, optimizer, **asked)[1]


class Asked(TypedDict, total=False):
    """What `plan` is asked for beside the model, its batch and its optimiser; see there."""

    budget: Required[int | str | Budget]
    loss: Loss | None
    host_budget: int | str | None
    disk: str | None
    exact: bool
    hardware: str | None


def profiled(
    model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None, **asked: Unpack[Asked]
) -> tuple[Profile, Plan]:
    """Do what `plan` does, and return the profile too, from which the plan can be made once more."""
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
    seen = Seen(other_bytes=beside_bytes)
    step = profile(model, batch, optimizer, loss=asked.get("loss"), seen=seen, hardware=hardware)
    if known is not None and allowed.device_bytes > known.device_bytes:
        note = f"the budget is more than the {format_bytes(known.device_bytes)} that {known.name} has"
        step = replace(step, notes=(*step.notes, note))
    left_out = unused(device, host_budget=host_budget, disk=disk, known=known)
    step = replace(step, link=link, notes=(*step.notes, *left_out))
    return step, solve(step, allowed, exact=asked.get("exact", False))


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
    with open("/proc/meminfo", encoding="ascii") as file:
        return int(file.readline().split()[1]) * 1024


def solve(step: Profile, budget: Budget, *, exact: bool = False) -> Plan:
    """Choose for a profiled step.

    Args:
        step: the profile.
        budget: bytes allowed on the device.
        exact: only choices that leave every loss and gradient bit-equal.

    Returns:
        The fastest plan that fits.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that would.
    """
    made = _decide(step, budget, exact=exact)
    if isinstance(made, int):  # raised here, where no frame of the traceback keeps the tensors of `StepCost` alive
        raise BudgetError(_refusal(budget, made, exact=exact), smallest_bytes=made)
    return made


def _decide(step: Profile, budget: Budget, *, exact: bool) -> Plan | int:
    """Return the fastest plan that fits, or the smallest budget that one would."""
    costs = StepCost(step)
    allowed = [cost for cost in step.optimizers if not exact or cost.state_format in EXACT_FORMATS]
    formats: list[OptimizerCost | None] = [*allowed] or [None]
    searches = [each for optimizer in formats for each in _searches(costs, optimizer, exact=exact)]
    smallest = min(search.least().cost.peak_bytes for search in searches)
    smallest_budget_bytes = math.ceil((smallest + _spare_bytes(step)) / (1 - HEADROOM))
    limit_bytes = _limit_bytes(step, budget)
    found = [chosen for search in searches if (chosen := search.fastest(limit_bytes)) is not None]
    if not found:
        return smallest_budget_bytes
    plain = costs.price((), formats[0])
    # Lossy states are not chosen for speed alone: a plan as fast as the training as it is counts as no slower than any.
    chosen = min(found, key=lambda each: max(each.cost.seconds, plain.seconds))
    return plan_of(costs, chosen, plain, budget, exact=exact, smallest_bytes=smallest_budget_bytes)


def least_plan(step: Profile, budget: Budget, *, exact: bool) -> Plan:
    """Return the plan with the lowest peak, with the optimiser as it is.

    Args:
        step: the profile.
        budget: bytes allowed on the device; where exact choices fit it, no others are made.
        exact: make no others anyway.

    Returns:
        The plan, which may exceed the budget.
    """
    costs, optimizer = StepCost(step), step.optimizers[0] if step.optimizers else None
    for lossy in (False, True):
        searches = _searches(costs, optimizer, exact=not lossy)
        chosen = min((search.least() for search in searches), key=lambda each: each.cost.peak_bytes)
        if exact or chosen.cost.peak_bytes <= _limit_bytes(step, budget):
            break
    plain = costs.price((), optimizer)
    return plan_of(costs, chosen, plain, budget, exact=exact, smallest_bytes=chosen.cost.peak_bytes)


def _spare_bytes(step: Profile) -> int:
    return LOADED_BATCHES * step.batch_bytes if step.device == "cpu" and not step.hardware else 0


def _limit_bytes(step: Profile, budget: Budget) -> int:
    """Return what the step may take of a budget."""
    return int(budget.device_bytes * (1 - HEADROOM)) - _spare_bytes(step)


def _searches(costs: StepCost, optimizer: OptimizerCost | None, *, exact: bool) -> list[Search]:
    """Return a search without the tier and, where there is one, some with it, which differ in the tier's window."""
    encoded, moved = encodings(costs, exact=exact), moves(costs, exact=exact)
    searches = [Search(costs, optimizer, encoded)]
    if moved:
        largest_bytes = max(map(costs.group_bytes, costs.groups))
        both = encoded | moved
        searches += [Search(costs.through(most), optimizer, both) for most in (1, WINDOW_GROUPS * largest_bytes)]
    return searches


def _refusal(budget: Budget, smallest_bytes: int, *, exact: bool) -> str:
    hint = "; without exact=True low-bit optimiser states may need less" if exact else ""
    return (
        f"no plan fits {format_bytes(budget.device_bytes)} ({budget.device_bytes} bytes); the smallest budget that "
        f"fits is {smallest_bytes} bytes ({format_bytes(smallest_bytes)}){hint}; or try a smaller batch"
    )
