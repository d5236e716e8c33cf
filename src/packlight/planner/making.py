"""Makes a session's plans, and turns what stands against one into the end of the script.

A plan is made in the middle of a script, from what is known by then: nothing of the loss before the first step, all of
it after. While one is made the model runs on fake tensors, and what a listener hears then is not the script's.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import nn
from torch.optim.optimizer import Optimizer

from packlight.budget import Budget, BudgetError
from packlight.planner.beside import other_bytes
from packlight.planner.curve import with_curve
from packlight.planner.cut import agreement_of
from packlight.planner.hardware import measure
from packlight.planner.known_hardware import named
from packlight.planner.loop import Call, Seen
from packlight.planner.plan import device_of, memory_bytes, off_meta
from packlight.planner.profile import ProfileError, profile
from packlight.planner.released import as_planned, as_released, solve_releasing
from packlight.planner.request import SessionStop, Settings
from packlight.planner.revise import carried_bytes
from packlight.planner.scope import Growth
from packlight.planner.solve import EXACT_FORMATS, least_plan, solve
from packlight.planner.world import solver_in
from packlight.records import Plan
from packlight.step import Profile


class Maker:
    """Makes plans for one model.

    Attributes:
        is_busy: whether a plan is being made.
        held: the plan whose state formats exist by now; None where no states do.
        agreement: with whom plans are agreed on: the ranks that share the model's states.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], settings: Settings) -> None:
        """Plan for a model and its optimisers; the list of these may grow.

        Raises:
            SessionStop: the model is cut in a way that plans are not made for.
        """
        self._model, self._optimizers, self._settings = model, optimizers, settings
        self.is_busy = False
        self.held: Plan | None = None
        try:
            self.agreement = agreement_of(model)
        except ValueError as error:
            raise SessionStop(str(error), exit_status=2) from error

    def other_bytes(self) -> int | None:
        """Return the bytes that live beside the model and its optimisers before the first step; None elsewhere."""
        if self._settings.hardware:
            return None
        measure(device_of(self._model).type)  # what measuring leaves behind is counted too
        return other_bytes(self._model, self._optimizers)

    def make(
        self, call: Call, seen: Seen, *, budget: int | None = None, before: Plan | None = None
    ) -> tuple[Profile, Plan]:
        """Profile and solve; once states exist, in the format that they have.

        Args:
            call: how the model is called.
            seen: what is known of the loop.
            budget: instead of the user's.
            before: the plan under which the last step ran.

        Returns:
            The profile and the plan.

        Raises:
            SessionStop: nothing fits, or the step cannot be traced.
        """
        wanted = budget or self._settings.budget or 0
        self.is_busy = True
        stack = ExitStack()
        stack.enter_context(off_meta())
        try:
            if self.held is not None and self.held.releases_gradients:  # none is left over, whatever the loop would do
                seen = replace(seen, gradients="none", num_microbatches=1)
            if self._settings.world is not None:
                seen = replace(seen, param_dtype=self._settings.world.param_dtype)
            device, hardware = device_of(self._model), self._settings.hardware
            allowed = Budget.of(wanted, total_bytes=memory_bytes(device, hardware))
            link = self._settings.link(device)
            step = profile(self._model, call, self._optimizers, seen=seen, hardware=hardware, link=link)
            step = _noted(step, self._model)
            step = replace(step, notes=(*step.notes, *self._settings.unused(device)))
            held = {} if self.held is None else self.held.state_formats
            kept = tuple(cost for cost in step.optimizers if held and _keeps(cost.formats, held))
            step = replace(step, optimizers=kept) if kept else step
            step = replace(step, carried_before_bytes=carried_bytes(step, before)) if before else step
            made = self._solve(step, allowed)
            points = self._settings.num_curve_points
            return step, with_curve(as_planned(step, made), made, num_points=points) if points else made
        except BudgetError as error:
            raise SessionStop(str(error), exit_status=3, smallest_bytes=error.smallest_bytes) from None
        except (ProfileError, ValueError) as error:
            raise SessionStop(str(error), exit_status=2) from error
        finally:
            self.is_busy = False
            stack.close()

    def make_together(self, call: Call, seen: Seen, *, before: Plan | None = None) -> tuple[Profile, Plan]:
        """Plan likewise, and agree with the ranks that share the model.

        Returns:
            This rank's profile, and everybody's plan.

        Raises:
            SessionStop: as `make`, if on one of them.
        """
        return self.agreement.made(lambda: self.make(call, seen, before=before))

    def _solve(self, step: Profile, allowed: Budget) -> Plan:
        """Solve; once the optimiser has stepped, gradients go on living as they do."""
        exact, world = self._settings.exact, self._settings.world
        if self.held is not None and self.held.releases_gradients:
            return as_released(solve(as_planned(step, self.held), allowed, exact=exact), step)
        releases = self.held is None and self._settings.release_gradients
        solver: Callable[[Profile], Plan] = functools.partial(
            solve_releasing if releases else solve, budget=allowed, exact=exact
        )
        if world is not None:
            hardware = named(self._settings.hardware)
            solver = solver_in(world, model=self._model, optimizers=self._optimizers, hardware=hardware, solver=solver)
        return solver(step)

    def make_or_least(
        self, call: Call, seen: Seen, *, budget: int | None = None, before: Plan | None = None
    ) -> tuple[Profile, Plan, bool]:
        """Plan likewise; where nothing fits, for the smallest budget that something does.

        Returns:
            The profile, the plan, and whether it fits.

        Raises:
            SessionStop: the step cannot be traced.
        """
        try:
            return *self.make(call, seen, budget=budget, before=before), True
        except SessionStop as stop:
            if stop.smallest_bytes is None:
                raise
            return *self.make(call, seen, budget=stop.smallest_bytes, before=before), False

    def make_larger(self, call: Call, seen: Seen, *, before: Plan, growth: Growth) -> tuple[Profile, Plan, str]:
        """Plan for a step that goes beyond all before, or the least that it needs.

        Replicas agree where all of them train more from now on; a larger batch may have come to one of them alone, and
        leaves states in the formats that they have.

        Args:
            call: how the model is called.
            seen: what is known of the loop.
            before: the plan in force.
            growth: in which way the step does.

        Returns:
            The profile, the plan, and what to say of it before it.

        Raises:
            SessionStop: the step cannot be traced.
        """
        titles = []

        def make() -> tuple[Profile, Plan]:
            step, plan, fits = self.make_or_least(call, seen, before=before)
            titles.append("" if fits else f"which does not fit {self._settings.budget}, the smallest ")
            return step, replace(plan, budget_bytes=before.budget_bytes)

        step, plan = self.agreement.made(make) if growth.is_of_trained else make()
        return step, plan, titles[0]

    def first(self, step: Profile, plan: Plan) -> Plan:
        """Return the most saving plan for the step in which the loop is seen.

        Args:
            step: the profile.
            plan: what was planned before; where gradients are released, states exist from the first backward on.
        """
        budget, exact = Budget.of(plan.budget_bytes), self._settings.exact
        if not plan.releases_gradients:
            return least_plan(step, budget, exact=exact)
        return as_released(least_plan(as_planned(step, plan), budget, exact=exact), step)

    def make_below(
        self, call: Call, seen: Seen, *, before: Plan, budget_bytes: int, limit_bytes: int | None
    ) -> tuple[Profile, Plan, str]:
        """Plan for less than what lived when memory ran out, if it did.

        Args:
            call: how the model is called.
            seen: what is known of the loop.
            before: the plan under which the last step ran.
            budget_bytes: the user's budget.
            limit_bytes: what lived when memory ran out; None where it did not.

        Returns:
            The profile, the plan, and what to say of it before it.

        Raises:
            SessionStop: the step cannot be traced, or nothing fits the user's budget.
        """
        if limit_bytes is None or limit_bytes >= budget_bytes:
            return *self.make_together(call, seen, before=before), ""
        titles = []

        def tight() -> tuple[Profile, Plan]:
            step, plan, fits = self.make_or_least(call, seen, budget=limit_bytes, before=before)
            titles.append("" if fits else "with nothing that fits what there was when memory ran out, the smallest ")
            return step, replace(plan, budget_bytes=budget_bytes)

        return *self.agreement.made(tight), titles[0]


def _keeps(formats: Mapping[str, str], held: Mapping[str, str]) -> bool:
    """Tell whether states may go on under formats: as they are held; those of more parameters may have any."""
    if held.keys() >= formats.keys() or not set(held.values()).issubset(EXACT_FORMATS):
        return all(formats.get(name, chosen) == chosen for name, chosen in held.items())
    return True  # torch's own can become what a plan with more parameters wants


def _noted(step: Profile, model: nn.Module) -> Profile:
    """Say what is not supported yet."""
    if type(model).__name__ != "OptimizedModule":
        return step
    note = "the model is wrapped by torch.compile; under packlight it may run eagerly"
    return replace(step, notes=(*step.notes, note))
