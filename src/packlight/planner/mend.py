"""Holds a plan against what happens in its first steps, and makes it once more where it was wrong.

A profile is a trace on fake tensors: what only the real forward allocates, or a device that has less room than it says,
is not in it. The idea: the first whole step under a plan is measured in the same bytes that were predicted. The
difference is taken as bytes that live beside the step, and the plan is made again with them, once. Memory that runs
out before (`retry.py`) is a measurement too: what lived then is more than what is allowed from there on.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import nn

from packlight.budget import Budget, BudgetError, format_bytes
from packlight.planner.agree import Agreement
from packlight.planner.exhausted import Exhausted, exhausted
from packlight.planner.measure import StepWatch
from packlight.planner.retry import Retry, Tightener
from packlight.planner.revise import rescale
from packlight.planner.solve import EXACT_FORMATS, least_plan, solve
from packlight.records import Plan
from packlight.step import Profile

TOLERANCE = 0.02
"""Share of the predicted peak by which the measured one may miss it."""

NUM_RETRIED_STEPS = 2
"""In so many steps work is repeated where memory runs out."""

Change = Callable[[Plan], None]
Tell = Callable[[Plan, str], None]
"""Called with a plan and what to say before it."""


class Mend(Tightener):
    """The plan in force for a model, in its first steps.

    Args:
        model: the model.
        watch: what measures its steps.
        change: carries out another plan for what the model saves.
        tell: tells the user.
        note: told instead of a whole step whose peak is below its prediction, where that is no news; None: `tell`.
        num_steps: whole steps under a plan until its peak is at its highest.
        agreement: with other ranks, which would wait for one that does its work twice: then nothing is repeated.

    Attributes:
        plan: the plan in force.
        pace: how long a real step took, and how long it was predicted to take.
        limit_bytes: less than lived when memory ran out; None where it did not.
    """

    def __init__(
        self,
        model: nn.Module,
        watch: StepWatch,
        *,
        change: Change,
        tell: Tell,
        note: Tell | None = None,
        num_steps: int = 1,
        agreement: Agreement | None = None,
    ) -> None:
        self.plan: Plan | None = None
        self.pace = 1.0, 1.0
        self.limit_bytes: int | None = None
        self._step: Profile | None = None
        self._watch, self._change, self._tell, self._note = watch, change, tell, note or tell
        self._num_elements: int | None = None
        self._num_steps, self._least_steps, self._whole_steps = 0, num_steps, 0
        self._is_verified = self._is_mended = self._is_late = self._is_final = False
        self._agreement = agreement or Agreement()
        self._retry = Retry(model, self, repeats=not self._agreement.is_shared)
        self.remove, self.forget, self.backward = self._retry.remove, self._retry.forget, self._retry.backward
        self.step_aside = self._retry.step_aside

    def begin(
        self, plan: Plan, step: Profile | None, *, num_elements: int | None = None, is_final: bool = True
    ) -> None:
        """Take a plan that has been carried out.

        Args:
            plan: the plan.
            step: the profile that it was made from; None where there is none, as for a plan from a file.
            num_elements: of the arguments that it was made for; None where that is not known.
            is_final: whether its estimate is to be held against what is measured.
        """
        self.plan, self._step, self._num_elements = plan, step, num_elements
        self._is_late, self._whole_steps = self._watch.step_is_open(), 0
        self._is_verified, self._is_final = not is_final, is_final
        self._retry.stand_outermost()
        self._watch.plan_begins()

    def step_ends(self) -> None:
        """Count a step, and look at what it has shown."""
        self._num_steps += 1
        if not self._is_late:
            self._whole_steps += 1
        self._is_late = False
        measured_bytes = self._watch.plan_peak_bytes() if self._whole_steps else None
        if self.plan is not None and not self._is_verified and measured_bytes is not None:
            self._verify(self.plan, measured_bytes)
        self._retry.num_elements = 0
        if not self.is_retrying():
            self._retry.remove()
            self._step = None if self._is_verified else self._step

    def is_verified(self) -> bool:
        """Tell whether a plan has been held against what was measured, and nothing is left to say."""
        return self._is_verified

    def is_retrying(self) -> bool:
        """Tell whether work is repeated still where memory runs out."""
        return self._num_steps < NUM_RETRIED_STEPS

    def look(self, error: BaseException, where: str) -> Exhausted:
        """Look at what lives on the device, as long as the error's frames hold it."""
        return exhausted(error, self._watch, where=where)

    def backward_obstacle(self) -> str:
        """Say why a backward cannot be run again; nothing where it can."""
        return "parameters are stepped inside it" if self.plan and self.plan.releases_gradients else ""

    def tighten(self, failure: Exhausted) -> Iterator[None]:
        """Carry out plans for less than lived when memory ran out; where there is none, the same one once more."""
        if self.plan is None:
            return
        self.limit_bytes = failure.live_bytes
        self._is_mended = True
        title = (
            f"out of memory in {failure.where} of step {self._num_steps + 1}, with {format_bytes(failure.live_bytes)} "
            "live; what failed is done again, "
        )
        with self._watch.aside():
            plans = tighter(self.plan, self._step, failure.live_bytes)
        for plan, how in plans:
            with self._watch.aside():
                self._take(plan, is_final=self._is_final)
                self._tell(self.plan, f"{title}{how}: ")
            yield

    def _verify(self, plan: Plan, measured_bytes: int) -> None:
        if not self._agreement.largest(int(self._is_wrong(plan, measured_bytes))):
            return
        self._is_verified, measured_bytes = True, self._agreement.largest(measured_bytes)
        predicted_bytes, is_above = plan.estimate.device_peak_bytes, measured_bytes > plan.budget_bytes
        said = f"after step {self._num_steps}, measured {format_bytes(measured_bytes)} where "
        said += f"{format_bytes(predicted_bytes)} was predicted, "
        above = f"ABOVE THE BUDGET of {format_bytes(plan.budget_bytes)}, " if is_above else ""
        tell = self._tell if is_above or measured_bytes > predicted_bytes else self._note
        if self._step is None or self._is_mended:
            tell(plan, f"{said}{above}and the plan stays as it is: ")
            return
        self._is_mended, step = True, corrected(self._step, measured_bytes - predicted_bytes)
        made, is_enough = mended(plan, step)
        made = self._agreement.plan(made)
        made = replace(made, notes=(*made.notes, f"made again {said.removesuffix(', ')}"))
        self._step = step
        self._take(made)
        tell(self.plan or made, said if is_enough else f"{said}{above}which no plan mends; the most saving ")

    def _is_wrong(self, plan: Plan, measured_bytes: int) -> bool:
        """Tell whether a measured peak is above the budget or, once it is at its highest, far from its prediction."""
        if measured_bytes > plan.budget_bytes:
            return True
        self._is_verified = self._whole_steps >= self._least_steps
        if self._is_mended or not self._is_verified:
            return False
        difference_bytes = measured_bytes - plan.estimate.device_peak_bytes
        is_smaller = self._num_elements is not None and self._retry.num_elements < self._num_elements
        is_far = abs(difference_bytes) > TOLERANCE * plan.estimate.device_peak_bytes
        return is_far and not (is_smaller and difference_bytes < 0)

    def _take(self, plan: Plan, *, is_final: bool = True) -> None:
        """Carry out another plan, which counts from the next step on."""
        if self.plan is not None and plan is not self.plan:
            plan = self._agreement.plan(like(rescale(plan, *self.pace), self.plan))
        self._change(plan)
        self._watch.measure_next()
        self.begin(plan, self._step, num_elements=self._num_elements, is_final=is_final)


def like(made: Plan, before: Plan) -> Plan:
    """Return a plan with what stays as it was: gradients, microbatches, and the step that it is compared with."""
    old = before.estimate
    slowdown = made.estimate.step_seconds * old.slowdown / old.step_seconds if old.step_seconds else 1.0
    estimate = replace(made.estimate, slowdown=slowdown, plain_peak_bytes=old.plain_peak_bytes)
    kept = {"releases_gradients": before.releases_gradients, "num_microbatches": before.num_microbatches}
    is_lossy = any(each not in EXACT_FORMATS for each in before.state_formats.values())  # the optimiser as it was
    is_other = is_lossy or before.releases_gradients or before.num_microbatches > 1
    return replace(made, **kept, estimate=estimate if is_other else made.estimate)  # type: ignore[arg-type]


def corrected(step: Profile, difference_bytes: int) -> Profile:
    """Return a profile with bytes that live beside the step, as many as were measured above its prediction."""
    other_bytes = max(0, step.resident_bytes.get("other", 0) + difference_bytes)
    return replace(step, resident_bytes={**step.resident_bytes, "other": other_bytes})


def mended(plan: Plan, step: Profile) -> tuple[Plan, bool]:
    """Make a plan again from a corrected profile, with the optimiser's states in the format that they have.

    Returns:
        The fastest plan that fits, or the most saving one; and whether it fits.
    """
    step, budget = with_formats_of(plan, step), Budget.of(plan.budget_bytes)
    try:
        return solve(step, budget, exact=plan.exact), True
    except BudgetError:
        return least_plan(step, budget, exact=plan.exact), False


def tighter(plan: Plan, step: Profile | None, limit_bytes: int) -> list[tuple[Plan, str]]:
    """Return plans for fewer bytes than a plan in force, the fastest first, each with what it is.

    Args:
        plan: the plan in force.
        step: the profile that it was made from; None: all its blocks are recomputed.
        limit_bytes: bytes that are too many.
    """
    if step is None:
        plans = [(all_recomputed(plan), "with every block recomputed")]
    else:
        step = with_formats_of(plan, step)
        least = least_plan(step, Budget.of(max(1, limit_bytes)), exact=plan.exact)
        plans = [(replace(least, budget_bytes=plan.budget_bytes), "under the most saving plan")]
        try:
            fitting = solve(step, Budget.of(max(1, limit_bytes)), exact=plan.exact)
            plans.insert(0, (replace(fitting, budget_bytes=plan.budget_bytes), "under a tighter plan"))
        except BudgetError:
            pass
    found: list[tuple[Plan, str]] = []
    for made, how in plans:
        if all(_done(made) != _done(other) for other in (plan, *(each for each, _ in found))):
            found.append((made, how))
    return found or [(plan, "under the same plan, since none saves more")]


def _done(plan: Plan) -> tuple[object, ...]:
    """Return what a plan does; its times may be scaled."""
    choices = tuple((choice.group, choice.choice, choice.codec) for choice in plan.choices)
    return plan.tier, plan.window_bytes, choices


def with_formats_of(plan: Plan, step: Profile) -> Profile:
    """Leave a profile the one state format that a plan has, where it knows that."""
    held = tuple(cost for cost in step.optimizers if cost.formats == plan.state_formats)
    return replace(step, optimizers=held) if held else step


def all_recomputed(plan: Plan) -> Plan:
    """Recompute every block that a plan names, with what lies outside of them held as it says."""
    blocks = tuple(choice.group.partition("[")[0] for choice in plan.choices if not choice.sites)
    choices = [
        replace(choice, choice="recompute") if not choice.sites else choice
        for choice in plan.choices
        if not (choice.sites and any(_is_inside(site, blocks) for site in choice.sites))
    ]
    notes = (*plan.notes, "its peak is not predicted: it has no profile")
    return replace(plan, choices=tuple(choices), kept=(), notes=notes, predicted=None)


def _is_inside(site: str, blocks: tuple[str, ...]) -> bool:
    return any(site.startswith((f"{block}.", f"{block}:")) or not block for block in blocks)
