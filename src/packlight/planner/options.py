"""What could be done with each storage group, and what that would add to a step by itself."""

from collections.abc import Mapping

from packlight.planner.cost import StepCost
from packlight.planner.held import EXACT_CODEC, Treatment, has_sign
from packlight.planner.program import Option

LOSSY_CODEC = "int8"
"""How others are: of the codecs of about a byte an element the one with the least error."""


def encodings(costs: StepCost, *, exact: bool) -> dict[Option, float]:
    """Return how each group may be encoded, and its seconds a step."""
    options: dict[Option, float] = {}
    for name, group in costs.groups.items():
        if group.exact or (group.can_encode and not exact):
            treatment = Treatment("compress", EXACT_CODEC if group.exact else LOSSY_CODEC)
            options[name, treatment] = costs.treatment_seconds(name, treatment)
    return options


def moves(costs: StepCost, *, exact: bool) -> dict[Option, float]:
    """Return how each group may be moved to the tier, and its seconds a step without waiting."""
    if costs.profile.link is None:
        return {}
    options: dict[Option, float] = {}
    for name, group in costs.groups.items():
        treatments = [Treatment("offload")]
        if group.can_encode and not (group.exact or exact or has_sign(costs.profile, group)):
            treatments.append(Treatment("compress+offload", LOSSY_CODEC))
        options |= {(name, treatment): costs.treatment_seconds(name, treatment) for treatment in treatments}
    return options


def by_name(costs: StepCost, *, exact: bool) -> Mapping[str, Mapping[str, float]]:
    """Return what each choice that there is for a block or a group adds, in seconds a step."""
    found = {block: {"keep": 0.0, "recompute": costs.recompute_seconds(block)} for block in costs.saving_blocks()}
    for (name, treatment), seconds in (encodings(costs, exact=exact) | moves(costs, exact=exact)).items():
        found.setdefault(name, {"keep": 0.0})[treatment.choice] = seconds
    return found
