"""Finds the fastest plan whose predicted peak fits the budget.

torch's own choices are all or nothing, or a fraction that nobody can relate to bytes. The idea, for blocks that are
kept or recomputed: look at where the peak stands, and recompute the block that spares the most bytes there for each
second it costs; among equals the earliest, whose bytes live longest. Repeat until the peak fits and a little further,
then take back every choice that turns out not to be needed. This is done for each state format, and the fastest
result is taken, the exact one where that costs no time. Every step is judged by the whole line of events (`cost.py`),
never by the sum of what was spared.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from packlight.budget import Budget, BudgetError, format_bytes
from packlight.planner.cost import Cost, StepCost
from packlight.planner.loop import Loss, Seen, listed
from packlight.planner.measure import other_bytes
from packlight.planner.profile import profile
from packlight.records import Choice, Estimate, Plan
from packlight.step import OptimizerCost, Profile

HEADROOM = 0.01
"""Share of the budget that a plan leaves free, for scalars and lists that a script makes beside the step."""

LOADED_BATCHES = 2
"""On the CPU a data loader's next batches share the device with the step; so many are left room for."""

NUM_FURTHER = 3
"""So many blocks more than needed are chosen, to see whether earlier ones can then be taken back for less."""

EXACT_FORMATS = ("fp32", "as is")


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
) -> Plan:
    """Decide how a training step fits a byte budget; runs nothing on the device and changes nothing.

    Tensors of the script that live on the model's device now (a data set) count as used throughout the step.

    Args:
        model: the module that is trained, on any device (also meta).
        batch: what the model takes: a mapping is `model(**batch)`, a tuple `model(*batch)`, a tensor `model(batch)`.
        optimizer: the optimiser that steps; None for forward and backward alone.
        budget: bytes allowed on the training device at the step's peak: an int, "12GiB", "800MB" or "80%".
        loss: a function of (output, batch) that returns a scalar; None: `output.loss`, or the output if it is a scalar.
        host_budget: bytes allowed in host memory; no choice of this version uses it.
        disk: folder of the disk tier; no choice of this version uses it.
        exact: only choices that leave every loss and gradient bit-equal.

    Returns:
        The fastest plan that fits.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that would.
        ValueError: the budget cannot be read, is not positive, or is larger than the device.
        ProfileError: the step cannot be traced on fake tensors.

    >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(8)])
    >>> made = plan(model, torch.ones(4096, 64), None, budget="20MiB", loss=lambda output, _: output.sum())
    >>> made.estimate.device_peak_bytes <= 20 * 2**20 < made.estimate.plain_peak_bytes
    True
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    allowed = Budget.of(budget, total_bytes=device_bytes(device) if device.type != "meta" else None)
    beside_bytes = None if device.type == "meta" else other_bytes(model, listed(optimizer))
    step = profile(model, batch, optimizer, loss=loss, seen=Seen(other_bytes=beside_bytes))
    return solve(step, allowed, exact=exact)


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
    spare_bytes = LOADED_BATCHES * step.batch_bytes if step.device == "cpu" else 0
    allowed_bytes = int(budget.device_bytes * (1 - HEADROOM)) - spare_bytes
    allowed = [cost for cost in step.optimizers if not exact or cost.state_format in EXACT_FORMATS]
    formats: list[OptimizerCost | None] = [*allowed] or [None]
    smallest = min(_least(costs, optimizer).peak_bytes for optimizer in formats)
    smallest_budget_bytes = math.ceil((smallest + spare_bytes) / (1 - HEADROOM))
    found = [result for optimizer in formats if (result := _fit(costs, optimizer, allowed_bytes)) is not None]
    if not found:
        return smallest_budget_bytes
    plain = costs.price((), formats[0])
    # Lossy states are not chosen for speed alone: a plan as fast as the training as it is counts as no slower than any.
    recomputed, optimizer, cost = min(found, key=lambda result: max(result[2].seconds, plain.seconds))
    return Plan(
        device=step.device,
        budget_bytes=budget.device_bytes,
        exact=exact,
        choices=_choices(costs, recomputed),
        state_formats=dict(optimizer.formats) if optimizer else {},
        estimate=_estimate(cost, plain),
        smallest_budget_bytes=smallest_budget_bytes,
        notes=step.notes,
    )


def _refusal(budget: Budget, smallest_bytes: int, *, exact: bool) -> str:
    hint = "; without exact=True low-bit optimiser states may need less" if exact else ""
    return (
        f"no plan fits {format_bytes(budget.device_bytes)} ({budget.device_bytes} bytes); the smallest budget that "
        f"fits is {smallest_bytes} bytes ({format_bytes(smallest_bytes)}){hint}; or try a smaller batch"
    )


def most_saving(step: Profile) -> frozenset[str]:
    """Return every block whose recomputation spares bytes."""
    costs = StepCost(step)
    return frozenset(block for block in costs.blocks if costs.held_bytes(block) > 0)


_Result = tuple[frozenset[str], OptimizerCost | None, Cost]


def _fit(costs: StepCost, optimizer: OptimizerCost | None, allowed_bytes: int) -> _Result | None:
    """Find the blocks to recompute for one state format, None where even the best choice does not fit."""
    found: list[_Result] = []
    recomputed: frozenset[str] = frozenset()
    cost = costs.price(recomputed, optimizer)
    while len(found) <= NUM_FURTHER:
        if cost.peak_bytes <= allowed_bytes:
            found.append(_without_needless(costs, (recomputed, optimizer, cost), allowed_bytes))
        block = _best_block(costs, recomputed, cost)
        if block is None or (found and not found[0][0]):
            break
        recomputed |= {block}
        cost = costs.price(recomputed, optimizer)
    return min(found, key=lambda result: result[2].seconds, default=None)


def _without_needless(costs: StepCost, result: _Result, allowed_bytes: int) -> _Result:
    """Take back every block that need not be recomputed, the slowest first."""
    recomputed, optimizer, cost = result
    for block in sorted(recomputed, key=costs.recompute_seconds, reverse=True):
        without = costs.price(recomputed - {block}, optimizer)
        if without.peak_bytes <= allowed_bytes:
            recomputed, cost = recomputed - {block}, without
    return recomputed, optimizer, cost


def _least(costs: StepCost, optimizer: OptimizerCost | None) -> Cost:
    """Find the smallest peak that recomputing can reach for one state format."""
    recomputed: frozenset[str] = frozenset()
    best = cost = costs.price(recomputed, optimizer)
    while (block := _best_block(costs, recomputed, cost)) is not None:
        recomputed |= {block}
        cost = costs.price(recomputed, optimizer)
        best = min(best, cost, key=lambda each: each.peak_bytes)
    return best


def _best_block(costs: StepCost, recomputed: Collection[str], cost: Cost) -> str | None:
    """Return the block that spares the most bytes at the peak for each second, None where none spares any."""
    best, best_ratio = None, 0.0
    for block in costs.blocks:
        if block not in recomputed:
            spared_bytes = costs.held_bytes(block, at=cost.at)
            ratio = spared_bytes / max(costs.recompute_seconds(block), 1e-9)
            if ratio > best_ratio * (1 + 1e-6):
                best, best_ratio = block, ratio
    return best


def _choices(costs: StepCost, recomputed: Collection[str]) -> tuple[Choice, ...]:
    return tuple(
        Choice(
            group=block,
            choice="recompute" if block in recomputed else "keep",
            bytes=costs.held_bytes(block),
            seconds=costs.recompute_seconds(block) if block in recomputed else 0.0,
        )
        for block in costs.blocks
        if costs.held_bytes(block) > 0
    )


def _estimate(cost: Cost, plain: Cost) -> Estimate:
    return Estimate(
        device_peak_bytes=cost.peak_bytes,
        host_peak_bytes=0,
        step_seconds=cost.seconds,
        slowdown=cost.seconds / plain.seconds if plain.seconds else 1.0,
        plain_peak_bytes=plain.peak_bytes,
        peak_by_category=cost.by_category,
        peak_moment=cost.moment,
    )


def predicted_step_seconds(step: Profile, recomputed: Collection[str]) -> float:
    """Return the predicted time of forward, loss and backward with some blocks recomputed, without the optimiser."""
    return StepCost(step).price(recomputed, None).seconds


def joined(step: Profile, plan: Plan, before: Plan) -> Plan:
    """Recompute what either of two plans recomputes, for batches of both kinds.

    Args:
        step: the profile that `plan` was made for.
        plan: a plan for the present batch.
        before: a plan for earlier batches.

    Returns:
        The joint plan; it expects the larger of the two peaks.
    """
    recomputed = plan.recomputed() | (before.recomputed() & {choice.group for choice in plan.choices})
    optimizer = next((cost for cost in step.optimizers if cost.formats == plan.state_formats), None)
    cost = StepCost(step).price(recomputed, optimizer)
    estimate = before.estimate
    if cost.peak_bytes >= estimate.device_peak_bytes:
        estimate = replace(
            plan.estimate,
            device_peak_bytes=cost.peak_bytes,
            peak_by_category=cost.by_category,
            peak_moment=cost.moment,
        )
    choices = tuple(
        replace(choice, choice="recompute" if choice.group in recomputed else "keep") for choice in plan.choices
    )
    return replace(plan, choices=choices, estimate=estimate)


def rescale(made: Plan, measured_seconds: float, predicted_seconds: float) -> Plan:
    """Scale a plan's times by how long a real step took beside its prediction."""
    factor = measured_seconds / predicted_seconds if predicted_seconds else 1.0
    estimate = replace(made.estimate, step_seconds=made.estimate.step_seconds * factor)
    choices = tuple(replace(choice, seconds=choice.seconds * factor) for choice in made.choices)
    return replace(made, estimate=estimate, choices=choices)
