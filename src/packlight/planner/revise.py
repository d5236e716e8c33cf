"""What becomes of a plan when more is known: how long a real step took, or that batches can be larger."""

from collections.abc import Mapping
from dataclasses import replace

from packlight.planner.cost import StepCost
from packlight.planner.held import Treatment
from packlight.planner.lives import predicted
from packlight.planner.loop import Seen
from packlight.planner.moving import moved_bytes, order_of_use
from packlight.planner.options import by_name
from packlight.planner.outcome import choices_of, host_bytes, treated_by
from packlight.planner.released import as_planned
from packlight.records import Choice, Plan
from packlight.step import OptimizerCost, Profile

MOST_PACE = 8.0
"""A step that is slower than its operators by more was late for a reason of its own; Python's pace is less on a GPU."""


def predicted_step_seconds(step: Profile, plan: Plan) -> float:
    """Return the predicted time of forward, loss and backward under a plan, without the optimiser."""
    costs = StepCost(step).through(plan.window_bytes)
    return costs.price(plan.recomputed(), None, treated=_treated(costs, plan)).seconds


def _treated(costs: StepCost, *plans: Plan) -> dict[str, Treatment]:
    """Return what plans do with the groups of a profile, maybe another than they were made for; the last one counts."""
    both = {name: treatment for plan in plans for name, treatment in treated_by(plan).items()}
    return {name: treatment for name, treatment in both.items() if name in costs.groups}


def carried_bytes(step: Profile, before: Plan) -> int:
    """Return what the loop takes of a step's outputs into the next one, under a plan."""
    costs = StepCost(step)
    return costs.carried_bytes(before.recomputed(), _treated(costs, before))


def without_tier(seen: Seen, plan: Plan, step: Profile) -> Seen:
    """Take what a plan's tier needed for itself out of what was seen to live beside the step under it."""
    if seen.other_bytes is None or not plan.tier:
        return seen
    return replace(seen, other_bytes=seen.other_bytes - step.staging_bytes)


def joined(step: Profile, plan: Plan, before: Plan, *, supersedes: bool) -> Plan:
    """Do what either of two plans does, for batches of both kinds.

    Args:
        step: the profile that `plan` was made for.
        plan: a plan for the present batch.
        before: a plan for earlier batches.
        supersedes: whether no step ran under the plan before, and no batch that it was made for takes more than this.

    Returns:
        The joint plan; it expects the larger of the two peaks, unless it supersedes, and the time of the present batch.
    """
    step = as_planned(step, plan)
    mover = max(plan, before, key=lambda each: each.window_bytes)
    costs = StepCost(step).through(mover.window_bytes)
    recomputed = plan.recomputed() | (before.recomputed() & {choice.group for choice in plan.choices})
    free = {group.name for group in costs.treatable(recomputed)}
    present = _treated(costs, plan)
    both = present | {name: each for name, each in _treated(costs, before).items() if name not in present}
    optimizer = _held(step, plan)
    wanted = {name: each for name, each in both.items() if name in free}
    treated = _that_fit(costs, wanted, taken_bytes=optimizer.host_bytes if optimizer else 0)
    cost = costs.price(recomputed, optimizer, treated=treated)
    estimate, memory = before.estimate, before.predicted
    if supersedes or cost.peak_bytes >= estimate.device_peak_bytes:
        memory = predicted(costs, cost, recomputed=recomputed, treated=treated, optimizer=optimizer)
        estimate = replace(
            plan.estimate,
            device_peak_bytes=cost.peak_bytes,
            peak_by_category=cost.by_category,
            peak_moment=cost.moment,
        )
    alone_seconds = costs.price(plan.recomputed(), optimizer, treated=present).seconds
    factor = cost.seconds / alone_seconds if alone_seconds else 1.0
    estimate = replace(
        estimate,
        host_peak_bytes=max(before.estimate.host_peak_bytes, host_bytes(costs, recomputed, treated, optimizer)),
        plain_peak_bytes=plan.estimate.plain_peak_bytes,
        step_seconds=plan.estimate.step_seconds * factor,
        slowdown=plan.estimate.slowdown * factor,
    )
    of_tier = ("tier", "folder", "window_bytes", "out_bytes_per_second", "in_bytes_per_second")
    tier = {name: getattr(mover, name) for name in of_tier}
    tier["uses"] = order_of_use(step, costs.groups, treated) if mover.tier else ()
    choices = choices_of(costs, recomputed, treated, options=by_name(costs, exact=plan.exact))
    kept = tuple(choice for choice in plan.kept if choice.group in free and choice.group not in treated)
    num_left = len(free.intersection(both)) - len(treated)
    notes = (*plan.notes, *[f"the tier has no room for {num_left} groups of earlier batches"] * (num_left > 0))
    return replace(plan, choices=choices, kept=kept, estimate=estimate, notes=notes, predicted=memory, **tier)


def _held(step: Profile, plan: Plan) -> OptimizerCost | None:
    """Return what a plan's states cost; if other parameters are stepped now, what states of the same kinds do."""
    same = [cost for cost in step.optimizers if cost.formats == plan.state_formats]
    kinds = set(plan.state_formats.values())
    return next(iter(same + [cost for cost in step.optimizers if set(cost.formats.values()) == kinds]), None)


def _that_fit(costs: StepCost, treated: Mapping[str, Treatment], *, taken_bytes: int) -> dict[str, Treatment]:
    """Leave out what the tier has no room for after what stands before it, and what else is there."""
    room = (costs.profile.link.capacity_bytes if costs.profile.link else 0) - taken_bytes
    kept = {}
    for name, treatment in treated.items():
        num_bytes = moved_bytes(costs.profile, costs.groups[name], treatment) if treatment.is_moved else 0
        if num_bytes <= room:
            kept[name] = treatment
            room -= num_bytes
    return kept


def pace(measured_seconds: float, predicted_seconds: float) -> tuple[float, float]:
    """Return a first step's time and its prediction, by which others are scaled; 1 and 1 where it tells nothing.

    A first step is late where libraries build kernels in it, or others compute on the machine.
    """
    is_telling = predicted_seconds > 0 and 1 / MOST_PACE < measured_seconds / predicted_seconds < MOST_PACE
    return (measured_seconds, predicted_seconds) if is_telling else (1.0, 1.0)


def rescale(made: Plan, measured_seconds: float, predicted_seconds: float) -> Plan:
    """Scale a plan's times by how long a real step took beside its prediction."""
    factor = measured_seconds / predicted_seconds if predicted_seconds else 1.0
    estimate = replace(made.estimate, step_seconds=made.estimate.step_seconds * factor)
    choices, kept = (tuple(_scaled(choice, factor) for choice in each) for each in (made.choices, made.kept))
    memory = made.predicted
    if memory is not None and memory.lanes is not None:
        memory = replace(memory, lanes=memory.lanes.scaled(factor))
    return replace(made, estimate=estimate, choices=choices, kept=kept, predicted=memory)


def _scaled(choice: Choice, factor: float) -> Choice:
    options = {name: seconds * factor for name, seconds in choice.options.items()}
    held_seconds = choice.held_seconds * factor
    return replace(choice, seconds=choice.seconds * factor, held_seconds=held_seconds, options=options)
