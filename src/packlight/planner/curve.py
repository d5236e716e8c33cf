"""Step time against budget: what more bytes would buy, and what fewer would cost.

A plan answers for one budget, and nobody knows before which one is worth its price. The same profile answers for all:
between the smallest budget that fits and the one for which nothing has to be changed, a few are solved for.
"""

import math
from dataclasses import replace

from packlight.budget import Budget
from packlight.planner.solve import HEADROOM, Solver
from packlight.records import CurvePoint, Plan
from packlight.step import Profile


def with_curve(step: Profile, made: Plan, *, num_points: int) -> Plan:
    """Add to a plan what other budgets would give.

    Args:
        step: the profile that it was made from.
        made: the plan.
        num_points: budgets that are tried, evenly from the smallest that fits to one for which nothing is changed.

    Returns:
        The plan with `curve`, by growing budget; slower plans for larger budgets are left out.

    Raises:
        ValueError: fewer than two points.
    """
    if num_points < 2:
        raise ValueError(f"{num_points} points came for a curve; wanted 2 or more")
    least_bytes = made.smallest_budget_bytes
    most_bytes = max(least_bytes, math.ceil((made.estimate.plain_peak_bytes + 1) / (1 - HEADROOM)))
    solver, points = Solver(step, exact=made.exact), list[CurvePoint]()
    for at in range(num_points):
        budget_bytes = least_bytes + (most_bytes - least_bytes) * at // (num_points - 1)
        planned = solver.fastest(Budget(budget_bytes))
        if isinstance(planned, int):  # with gradients as in the plan nothing fits
            continue
        found = planned.estimate
        if not points or found.step_seconds <= points[-1].step_seconds:
            points.append(CurvePoint(budget_bytes, found.device_peak_bytes, found.step_seconds, found.slowdown))
    return replace(made, curve=tuple(points))
