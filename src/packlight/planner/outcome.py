"""Writes what a search has found as a `Plan`: what is done with blocks and groups, and what else could be."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from packlight.budget import Budget
from packlight.planner.cost import Cost, StepCost
from packlight.planner.held import Treatment
from packlight.planner.lives import predicted
from packlight.planner.moving import order_of_use
from packlight.planner.options import by_name
from packlight.planner.search import Chosen
from packlight.records import Choice, Estimate, Plan
from packlight.step import OptimizerCost, Save


def plan_of(costs: StepCost, chosen: Chosen, plain: Cost, budget: Budget, *, exact: bool, smallest_bytes: int) -> Plan:
    """Return a search's result as a record.

    Args:
        costs: of the profile.
        chosen: the result.
        plain: what keeping everything costs.
        budget: bytes allowed on the device.
        exact: whether lossy choices were excluded.
        smallest_bytes: the least budget that something fits.

    Returns:
        The plan.
    """
    options = by_name(costs, exact=exact)
    in_host_bytes = host_bytes(costs, chosen.recomputed, chosen.treated, chosen.optimizer)
    return Plan(
        device=costs.profile.device,
        budget_bytes=budget.device_bytes,
        exact=exact,
        choices=choices_of(costs, chosen.recomputed, chosen.treated, options=options),
        kept=_kept(costs, chosen, options),
        state_formats=dict(chosen.optimizer.formats) if chosen.optimizer else {},
        num_elements=dict(chosen.optimizer.num_elements) if chosen.optimizer else {},
        estimate=_estimate(chosen.cost, plain, host_bytes=in_host_bytes),
        smallest_budget_bytes=smallest_bytes,
        notes=costs.profile.notes,
        hardware=costs.profile.hardware,
        predicted=predicted(
            costs.through(chosen.window_bytes),
            chosen.cost,
            recomputed=chosen.recomputed,
            treated=chosen.treated,
            optimizer=chosen.optimizer,
        ),
        **_tier(costs, chosen),
    )


def _tier(costs: StepCost, chosen: Chosen) -> dict[str, Any]:
    """Return the fields of a plan that say where groups are moved to; none where they are not."""
    link = costs.profile.link
    if link is None or not any(treatment.is_moved for treatment in chosen.treated.values()):
        return {}
    uses = order_of_use(costs.profile, costs.groups, chosen.treated)
    return {
        "tier": link.tier,
        "folder": link.folder,
        "window_bytes": chosen.window_bytes,
        "out_bytes_per_second": link.out_bytes_per_second,
        "in_bytes_per_second": link.in_bytes_per_second,
        "uses": uses,
    }


def choices_of(
    costs: StepCost,
    recomputed: Collection[str],
    treated: Mapping[str, Treatment],
    *,
    options: Mapping[str, Mapping[str, float]],
) -> tuple[Choice, ...]:
    """Return the record of what is done with blocks and with groups.

    Args:
        costs: of the profile.
        recomputed: blocks.
        treated: what is done with groups.
        options: seconds that each choice adds, by block and group.

    Returns:
        The blocks that hold something, then the groups.
    """
    blocks = [
        Choice(
            group=block,
            choice="recompute" if block in recomputed else "keep",
            bytes=costs.held_bytes(block),
            seconds=costs.recompute_seconds(block) if block in recomputed else 0.0,
            held_seconds=_held_seconds([save for save in costs.profile.saves if costs.block_of(save) == block]),
            options=options.get(block, {}),
        )
        for block in costs.saving_blocks()
    ]
    groups = [
        Choice(
            group=name,
            choice=treatment.choice,
            bytes=costs.group_bytes(name),
            seconds=costs.treatment_seconds(name, treatment),
            codec=treatment.codec,
            sites=tuple(save.site for save in _saves(costs, name)),
            held_seconds=_held_seconds(_saves(costs, name)),
            options=options.get(name, {}),
        )
        for name, treatment in treated.items()
    ]
    return (*blocks, *groups)


def _kept(costs: StepCost, chosen: Chosen, options: Mapping[str, Mapping[str, float]]) -> tuple[Choice, ...]:
    """Return the groups that stay as they are, of those that something could be done with."""
    free = (group.name for group in costs.treatable(chosen.recomputed))
    return tuple(
        Choice(
            group=name,
            choice="keep",
            bytes=costs.group_bytes(name),
            seconds=0.0,
            held_seconds=_held_seconds(_saves(costs, name)),
            options=options[name],
        )
        for name in free
        if name in options and name not in chosen.treated
    )


def _saves(costs: StepCost, name: str) -> list[Save]:
    return [costs.profile.saves[at] for at in costs.groups[name].saves]


def _held_seconds(saves: Collection[Save]) -> float:
    """Return the predicted time from the first of some saves to the last use."""
    if not saves:
        return 0.0
    return max(save.unpacked_seconds for save in saves) - min(save.packed_seconds for save in saves)


def treated_by(plan: Plan) -> dict[str, Treatment]:
    """Return what a plan does with groups, as `StepCost.price` takes it."""
    return {each.group: Treatment(each.choice, each.codec) for each in plan.choices if each.sites}


def plain_cost(costs: StepCost) -> Cost:
    """Return what a step costs if nothing is changed."""
    step = costs.profile
    return costs.price((), step.optimizers[0] if step.optimizers else None)


def beside_plain(made: Plan, plain: Cost) -> Plan:
    """Compare a plan with what another step than its own costs if nothing is changed: one of a whole batch, say."""
    slowdown = made.estimate.step_seconds / plain.seconds if plain.seconds else 1.0
    return replace(made, estimate=replace(made.estimate, slowdown=slowdown, plain_peak_bytes=plain.peak_bytes))


def host_bytes(
    costs: StepCost, recomputed: Collection[str], treated: Mapping[str, Treatment], optimizer: OptimizerCost | None
) -> int:
    """Return what a plan takes of the host's memory: states and the host tier's all, or the disk's staging."""
    stored_bytes = costs.moving(recomputed, treated).stored_bytes
    of_states_bytes = optimizer.host_bytes if optimizer else 0
    if costs.profile.link is None or not stored_bytes:
        return of_states_bytes
    in_host_bytes = stored_bytes if costs.profile.link.tier == "host" else costs.profile.link.staging_bytes
    on_cpu = costs.profile.device == "cpu" and not costs.profile.hardware
    return of_states_bytes + (0 if on_cpu else in_host_bytes)  # there it is the device's own memory


def _estimate(cost: Cost, plain: Cost, *, host_bytes: int) -> Estimate:
    return Estimate(
        device_peak_bytes=cost.peak_bytes,
        host_peak_bytes=host_bytes,
        step_seconds=cost.seconds,
        slowdown=cost.seconds / plain.seconds if plain.seconds else 1.0,
        plain_peak_bytes=plain.peak_bytes,
        peak_by_category=cost.by_category,
        peak_moment=cost.moment,
    )
