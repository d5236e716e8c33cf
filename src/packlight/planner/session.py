"""Plans for a training script while it runs, from outside.

A script names neither its model nor its step. The idea: its optimiser names the parameters that are trained, the first
outermost module that is called with gradients and holds them is the model, and that call has real shapes. The loss
outside the model is seen in step 1, under the most saving plan; the states' format is decided when the optimiser steps
for the first time, because states do not exist before.

```
1 the model is called for the first time   profile on fake tensors, first plan; nothing fits: stop before training
2 step 1 runs under the most saving plan   the loss, the microbatches and the gradients' lives are seen
3 the optimiser steps for the first time   profile with what was seen, final plan; states and blocks as it says
4 step 2 is over                           what it took is held against the plan, which is mended once (`mend.py`)
5 steps 1 to 3 are measured                later steps run at full speed
```
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from packlight.activations.offload import OffloadError
from packlight.measurement import Measurement
from packlight.memory import Memory
from packlight.planner.agree import Agreement, warn_of_growth
from packlight.planner.carry import Adoptions, Carried, carry_out, meets_states
from packlight.planner.cut import num_calls
from packlight.planner.exhausted import tell_once
from packlight.planner.finder import Finder
from packlight.planner.listen import Ears, Listener, LossLog, ModuleHook
from packlight.planner.loop import Call, Seen
from packlight.planner.making import Maker
from packlight.planner.measure import StepWatch
from packlight.planner.mend import Mend
from packlight.planner.profile import ProfileError
from packlight.planner.released import as_planned
from packlight.planner.request import SessionStop, Settings
from packlight.planner.revise import joined, pace, predicted_step_seconds, rescale, without_tier
from packlight.planner.scope import Growth, Scope
from packlight.records import Estimate, Plan
from packlight.step import Profile


class Session(Listener):
    """One run of a script: finds the model, plans, measures. Use it as a context manager around the script."""

    def __init__(self, settings: Settings) -> None:
        """Check the budget against the machine before anything of the script runs."""
        self.settings = settings
        self.plan: Plan | None = settings.plan
        self.first_estimate: Estimate | None = None
        self._finder = Finder()
        self._optimizers: list[Optimizer] = []
        self._adopted = Adoptions()
        self._watch: StepWatch | None = None
        self._call: Call | None = None
        self._step: Profile | None = None
        self._first: Plan | None = None
        self._model: nn.Module | None = None
        self._seen: Seen | None = None
        self._agreement = Agreement()
        self._blocks: Carried | None = None
        self._mend: Mend | None = None
        self._maker: Maker | None = None
        self._scope: Scope | None = None
        self._pace = 1.0, 1.0
        self._stop: SessionStop | None = None
        self._num_updates = 0
        self._between = False
        self._gradients: Literal["none", "forward", "step"] = "none"
        self._losses = LossLog()
        self._stack, self._in_call = ExitStack(), ExitStack()

    def __enter__(self) -> "Session":
        """Begin to listen: calls of modules, new optimisers, backward and optimiser steps."""
        ears = Ears(self)
        self._ignore_calls = ears.ignore_calls
        self._stack.callback(ears.close)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop listening, and undo the plan; all of it, also where a part of that fails."""
        with ExitStack() as undo:  # the last first
            undo.callback(self._adopted.release)
            undo.callback(self._put_blocks_back)
            if self._watch is not None:
                undo.callback(self._watch.close)
            if self._mend is not None:
                undo.callback(self._mend.remove)
            undo.callback(self._stack.close)

    @property
    def trained(self) -> bool:
        """Whether the script took an optimiser step on a model that was found."""
        return self._num_updates > 0

    @property
    def _planning(self) -> bool:
        return self._maker is not None and self._maker.is_busy

    def measurement(self) -> Measurement | None:
        """Return what was measured, None where nothing was trained."""
        if self._watch is None or not self.trained:
            return None
        measured = self._watch.measurement(self._losses.values())
        measured = measured if self._blocks is None else self._blocks.complete(measured)
        return self._adopted.complete(measured)

    def lived(self) -> Memory | None:
        """Return what lived over the step in which the measured peak stands; None where none was followed."""
        return None if self._watch is None else self._watch.lived.now()[1]

    def failed(self, error: BaseException) -> None:
        """Say what a user can do about the error that ends training, where memory has run out."""
        if self._watch is not None:
            tell_once(error, self._watch, self.plan)

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Remember an optimiser: its parameters will tell the model."""
        self._finder.optimizer_made(optimizer)

    def gradients_cleared(self, *, set_to_none: bool) -> None:
        """Learn how long gradients live on into the next step."""
        if self._planning or self._watch is None:
            return
        if not set_to_none:
            self._gradients = "step"
        elif self._between:
            self._gradients = "forward"

    def backward_begins(self, tensors: Any) -> None:
        """Note the loss."""
        if self._watch is not None and not self._planning:
            self._between = False
            self._losses.note(tensors)
            self._watch.backward_begins()

    def run_backward(self, backward: Callable[..., None], tensors: Any, *args: Any, **kwargs: Any) -> None:
        """Repeat the model's part of it where memory runs out."""
        run = self._mend.backward if self._mend is not None and not self._planning else super().run_backward
        run(backward, tensors, *args, **kwargs)

    def backward_ends(self) -> None:
        """Note the end of backward."""
        if self._watch is not None and not self._planning:
            self._watch.backward_ends()

    def called(self, module: nn.Module, call: Call) -> None:
        """Take a module as the model if an optimiser holds parameters of it (step 1)."""
        if self._watch is None and not self._planning:
            self._consider(module, call)

    def _consider(self, module: nn.Module, call: Call) -> None:
        found = self._finder.find(module, is_planned=self.settings.budget is not None)
        if found is None:
            return
        self._ignore_calls()
        self._model, trained = found
        self._call = call if self.settings.budget and not self.settings.plan else None  # else it would be held for good
        self._optimizers = trained
        self._scope, self._maker = Scope(call, self._model, trained), Maker(self._model, trained, self.settings)
        self._agreement = self._maker.agreement
        try:
            self._plan_before_first_step()
        except SessionStop as stop:
            self._stop, again = stop, ModuleHook(module, lambda *_: self._stop_again())
            if isinstance(stop.__cause__, ProfileError):  # the real forward first: the error may be the script's own
                self._stack.callback(module.register_forward_hook(again).remove)
                return
            self._stack.callback(module.register_forward_pre_hook(again).remove)
            raise
        hook = ModuleHook(module, lambda args, kwargs: self._forward_begins(Call(args, kwargs)))
        before = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._stack.callback(before.remove)
        self._watch = StepWatch(module, trained)
        self._begin_to_mend()
        after = module.register_forward_hook(ModuleHook(module, lambda *_: self._forward_ended()))
        self._stack.callback(after.remove)
        left = module.register_forward_hook(ModuleHook(module, lambda *_: self._in_call.close()), always_call=True)
        self._stack.callback(left.remove)

    def _begin_to_mend(self) -> None:
        """Stand around the plan in force; states and a loss to hold are there from the second step on."""
        plan = self._first or self.plan
        if plan is not None and self._model is not None and self._watch is not None:
            options: Any = {"change": self._change, "tell": self._tell, "agreement": self._agreement.in_step()}
            self._mend = Mend(self._model, self._watch, num_steps=1 if self.settings.plan is None else 2, **options)
            self._mend.begin(plan, self._step, is_final=self._first is None)

    def _tell(self, plan: Plan, title: str) -> None:
        """Tell the user, once for all ranks that have agreed."""
        if self._agreement.leads:
            self.settings.tell(plan, title)

    def _change(self, plan: Plan) -> None:
        """Carry out another plan for what the model saves."""
        assert self._model is not None
        self._in_call.close()
        self._put_blocks_back()
        self._blocks = carry_out(plan, self._model)
        if self._first is not None and self._seen is None:
            self._first = plan
        else:
            self.plan = plan

    def _stop_again(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _forward_begins(self, call: Call) -> None:
        """Plan anew for a batch that is longer in some dimension than all before, or where more is trained."""
        training = torch.is_grad_enabled() and not self._planning and self.settings.plan is None
        if not training or self._scope is None or self._watch is None or self._model is None:
            return
        for optimizer in self._finder.others(self._model, self._optimizers):
            self._meet(optimizer)
        growth = self._scope.growth(call)
        if growth is None:
            return
        if self._seen is not None and not self._agreement.is_shared:
            return self._plan_for_larger_steps(call, self._seen.for_batches(growth.ratio), growth)
        self._scope.planned(growth)
        if self.plan is None:
            self._watch.measure_next(growth.num_steps)
        elif self._agreement.is_shared:  # the other ranks' steps may be as before, and they would not ask
            warn_of_growth(growth.told)
        else:
            self._call = call

    def _forward_ended(self) -> None:
        self._between = torch.is_grad_enabled() and self._num_updates == 0

    def _plan_before_first_step(self) -> None:
        if self.settings.plan is not None:
            return self._carry_out_given(self.settings.plan)
        if self.settings.budget is None:
            return None
        assert self._model is not None and self._maker is not None and self._call is not None
        seen = Seen(other_bytes=self._maker.other_bytes())
        step, plan = self._maker.make_together(self._call, seen)
        self.first_estimate, self.plan = plan.estimate, plan
        self._tell(plan, "")
        if self.settings.stop_before_step:
            raise SessionStop("planned", exit_status=0)
        self._first = self._agreement.plan(self._maker.first(step, plan))
        self._blocks = carry_out(self._first, self._model)  # step 2
        self._step = step
        if plan.releases_gradients or meets_states(plan, self._optimizers):  # made in backward, or of a checkpoint
            self._adopted.adopt(plan, self._model, self._optimizers)
            self._maker.held = plan

    def _carry_out_given(self, plan: Plan) -> None:
        self.settings.check(plan)
        try:
            self._carry_out(plan)
        except (ValueError, OffloadError) as error:
            raise SessionStop(f"the plan does not suit this script: {error}", exit_status=2) from error

    def update_begins(self, optimizer: Optimizer) -> None:
        """Follow a step's end; in the first, decide (step 3)."""
        if self._watch is None or self._planning:
            return
        if optimizer not in self._optimizers:
            self._meet(optimizer)
        if self._mend is not None:
            self._mend.forget()
        self._watch.update_begins()
        if self._ready_to_plan_again():
            self._plan_again()

    def _ready_to_plan_again(self) -> bool:
        """Tell whether a step has been seen; states of an optimiser that cannot be traced take one step more."""
        if self._step is None or self._seen is not None or self._watch is None or not self._watch.num_microbatches:
            return False
        if torch._C._current_graph_task_id() != -1:  # an optimiser that steps inside backward
            return False
        return bool(self._step.optimizers) or self._num_updates > 0

    def _meet(self, optimizer: Optimizer) -> None:
        """Take in an optimiser that was made after the first forward."""
        assert self._model is not None and self._watch is not None and self._scope is not None
        if self.settings.budget is not None:
            self._finder.refuse_others(self._model)
        self._optimizers.append(optimizer)
        self._watch.optimizers.append(optimizer)
        self._watch.measure_again()
        self._scope.met_optimizer()  # the next forward plans anew

    def _plan_again(self) -> None:
        """Plan with what step 1 has shown, and carry that out (step 3)."""
        assert self._watch and self._first and self._mend and self._step and self._scope
        watch, seconds = self._watch, self._watch.step_seconds_so_far()
        self._seen = without_tier(watch.seen(self._gradients), self._first, self._step)
        with watch.aside():
            self._put_blocks_back()
            assert self._maker and self._call and self.plan
            known = (self._call, self._seen)
            step, plan, title = self._maker.make_below(
                *known, before=self._first, budget_bytes=self.plan.budget_bytes, limit_bytes=self._mend.limit_bytes
            )
            if self._mend.limit_bytes is None:  # else step 1 did some of its work twice, and planned in between
                self._mend.pace = self._pace = pace(seconds, predicted_step_seconds(step, self._first))
            plan = self._agreement.plan(rescale(plan, *self._pace))
            self._tell(plan, f"after step 1, {title}")
            self.plan, self._call = plan, None
            self._carry_out(plan)
            self._mend.begin(plan, as_planned(step, plan), num_elements=self._scope.planned_between())

    def _plan_for_larger_steps(self, call: Call, seen: Seen, growth: Growth) -> None:
        """Choose blocks anew, with the states' format as it is; where nothing fits, say so and spare what can be."""
        assert self._watch and self._model is not None and self.plan and self._maker and self._mend and self._scope
        before = self.plan
        with self._watch.aside():
            self._put_blocks_back()
            step, plan, misfit = self._maker.make_larger(call, seen, before=before, growth=growth)
            plan = joined(step, rescale(plan, *self._pace), before, supersedes=growth.supersedes)
            self._carry_out(plan)
            self._tell(plan, f"{growth.told}, {misfit}")
            self._scope.planned(growth)
            self.plan, self._seen = plan, seen
            self._mend.begin(plan, as_planned(step, plan), num_elements=self._scope.num_elements)
        if self._watch.model is self._model and self._blocks:  # torch has the forward that it is going to call already
            self._in_call.enter_context(self._blocks.saving(call))
        self._watch.measure_next(growth.num_steps)

    def _put_blocks_back(self) -> None:
        if self._mend is not None:
            self._mend.step_aside()
        if self._blocks is not None:
            self._blocks.remove()

    def _carry_out(self, plan: Plan) -> None:
        assert self._model is not None
        self._blocks = carry_out(plan, self._model)
        self._adopted.adopt(plan, self._model, self._optimizers)

    def update_ends(self, optimizer: Optimizer) -> None:
        """Count a step."""
        if self._watch is None or self._planning or optimizer not in self._optimizers:
            return
        self._watch.update_ends()
        self._num_updates += 1
        self._losses.end_step()
        if self._maker:
            self._maker.held = self.plan
        if self._mend and self._num_updates % sum(map(num_calls, self._optimizers)) == 0:
            self._mend.step_ends()
