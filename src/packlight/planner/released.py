"""Plans in which parameters are updated inside backward, and each gradient is freed at once.

A step keeps all gradients from backward until the optimiser has used them. Where the loop needs none of them in between
(no clipping, no accumulation), each can go when its parameter has been stepped (`optim/early.py`). On the line of
events that is a change of a few intervals, so any plan can be priced so:

    gradient      born ........ complete | its parameter is stepped, with what that allocates | gone
    update        nothing is left to do, and no gradient to keep

The arithmetic is the same; calling an optimiser for each parameter alone takes a little more of Python's time.
"""

import functools
import math
from dataclasses import replace

from packlight.budget import Budget, BudgetError, least_of
from packlight.optim.early import alone_seconds
from packlight.planner.cost import StepCost
from packlight.planner.held import EXACT_CODEC
from packlight.planner.outcome import beside_plain, plain_cost
from packlight.planner.program import lossiness, rated
from packlight.planner.solve import Solver, allowed_formats, solve
from packlight.records import Plan
from packlight.step import OptimizerCost, Profile, Storage

NOT_RELEASED = (
    "gradients are not released: they are accumulated or set to zero in place, there are several processes, a "
    "parameter is read after its gradient is complete, or the optimiser is not one of torch's that step each "
    "parameter alone"
)


def released(step: Profile, optimizer: OptimizerCost) -> Profile:
    """Return a step whose gradients are freed as they are used.

    Args:
        step: the step as it is.
        optimizer: one of its state formats, the only one of the result.

    Returns:
        The step.
    """
    storages: list[Storage] = []
    added: list[Storage] = []
    for storage in step.storages:
        if storage.completed >= 0:
            storages.append(replace(storage, died=min(step.num_events, storage.completed + 1)))
            num_bytes = optimizer.alone_bytes + math.ceil(optimizer.alone_share * storage.num_bytes)
            added.append(Storage(num_bytes, storage.completed, storage.completed + 1, "backward"))
        elif storage.is_gradient and storage.died <= step.backward_start:  # of the step before, which leaves none now
            storages.append(replace(storage, died=storage.born))
        else:
            storages.append(storage)
    seconds = optimizer.seconds + len(added) * alone_seconds()
    # What the host steps goes there alone, so nothing is copied beside its kernels.
    in_turn_seconds = optimizer.host_seconds + step.copy_seconds(optimizer)
    in_place = replace(optimizer, temporary_bytes=0, seconds=seconds, host_seconds=in_turn_seconds, largest_share=0.0)
    return replace(step, storages=(*storages, *added), optimizers=(in_place,))


def can_release(step: Profile) -> bool:
    """Tell whether a step has gradients that are used once, in the backward that made them, each by itself."""
    is_once = step.num_microbatches == 1 and step.resident_bytes.get("gradients", 0) == 0
    return is_once and any(storage.completed >= 0 for storage in step.storages)


def solve_releasing(step: Profile, budget: Budget, *, exact: bool = False) -> Plan:
    """Choose for a step whose gradients may be freed early; they stay where nothing is gained.

    Args:
        step: the step as it is.
        budget: bytes allowed on the device.
        exact: only choices that leave every loss and gradient bit-equal.

    Returns:
        The fastest plan that fits.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that would.
    """
    if not can_release(step):
        return solve(replace(step, notes=(*step.notes, NOT_RELEASED)), budget, exact=exact)
    allowed = allowed_formats(step, exact=exact)
    rate = functools.partial(_rated, step=step)
    on_device = [released(step, cost) for cost in allowed if not cost.host_bytes]
    found, errors = list[Plan](), list[BudgetError]()
    for variant in [step, *on_device, *(released(step, cost) for cost in allowed if cost.host_bytes)]:
        best = min(found, key=rate, default=None)
        try:
            if best is not None and _is_out(variant, best, step):
                errors.append(BudgetError("", smallest_bytes=Solver(variant, exact=exact).smallest_bytes))
                continue
            made = solve(variant, budget, exact=exact)
        except BudgetError as error:
            errors.append(error)
        else:
            found.append(made if variant is step else as_released(made, step))
    smallest = [made.smallest_budget_bytes for made in found] + [error.smallest_bytes or 0 for error in errors]
    if not found:
        least = least_of(errors)
        raise least
    return replace(min(found, key=rate), smallest_budget_bytes=min(smallest))


def _is_out(variant: Profile, best: Plan, step: Profile) -> bool:
    """Tell whether a variant with states in host memory is no better than a plan even where nothing else is changed."""
    (cost,) = variant.optimizers if len(variant.optimizers) == 1 else (None,)
    if cost is None or not cost.host_bytes:
        return False
    plain_seconds = plain_cost(StepCost(step)).seconds
    slowdown = StepCost(variant).price((), cost).seconds / plain_seconds if plain_seconds else 1.0
    own = next(each for each in step.optimizers if each.formats == cost.formats)
    return rated(slowdown, lossiness(step.optimizers)[step.optimizers.index(own)] + 0.5) >= _rated(best, step=step)


def _rated(made: Plan, *, step: Profile) -> float:
    """Return a plan's slowdown, and what is lossy or released on top of it: these have to spare time."""
    numbers = zip(step.optimizers, lossiness(step.optimizers), strict=True)
    number = next((at for cost, at in numbers if cost.formats == made.state_formats), 0)
    number += any(choice.codec not in ("", EXACT_CODEC) for choice in made.choices) + bool(made.tier)
    return rated(made.estimate.slowdown, number + made.releases_gradients / 2)


def as_released(made: Plan, step: Profile) -> Plan:
    """Return a plan for a released step as one for the step as it is, with what that would cost if nothing changed."""
    return replace(beside_plain(made, plain_cost(StepCost(step))), releases_gradients=True)


def as_planned(step: Profile, plan: Plan) -> Profile:
    """Return the step as it is under a plan: with the plan's states, and gradients that are freed where it says so."""
    if not plan.releases_gradients:
        return step
    return released(
        step, next((each for each in step.optimizers if each.formats == plan.state_formats), step.optimizers[0])
    )
