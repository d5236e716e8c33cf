"""Plans for a training script while it runs, from outside.

A script names neither its model nor its step. The idea: its optimiser names the parameters that are trained, the first
outermost module that is called with gradients and holds them is the model, and that call has real shapes. What
cannot be
known then, the loss outside the model, is seen in step 1, which runs under the most saving choice of blocks; the
states' format is decided only when the optimiser steps for the first time, because states do not exist before.

```
1 the model is called for the first time   profile on fake tensors, first plan; nothing fits: stop before training
2 step 1 runs, every block recomputed      the loss, the microbatches and the gradients' lives are seen
3 the optimiser steps for the first time   profile with what was seen, final plan; states and blocks as it says
4 steps 1 to 3 are measured                later steps run at full speed
```
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from packlight.activations.recompute import Recomputation, recompute
from packlight.budget import Budget, BudgetError
from packlight.planner.apply import adopt_formats
from packlight.planner.loop import Call, Seen
from packlight.planner.measure import StepWatch
from packlight.planner.profile import ProfileError, profile
from packlight.planner.solve import device_bytes, most_saving, predicted_step_seconds, rescale, solve
from packlight.records import Estimate, Measurement, Plan
from packlight.step import Profile

NUM_KEPT_LOSSES = 10


class SessionStop(BaseException):
    """Ends a script from inside; not an `Exception`, so that the script's own handlers let it through."""

    def __init__(self, message: str, *, exit_status: int, smallest_bytes: int | None = None) -> None:
        """Keep the exit status, and the smallest budget that fits where that is the reason."""
        super().__init__(message)
        self.exit_status = exit_status
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        budget: bytes allowed on the device; None: measure the script as it is and change nothing.
        exact: only choices that leave every loss and gradient bit-equal.
        plan: a plan to carry out as it is, instead of making one.
        stop_before_step: stop when the first plan is made.
        tell: called with each plan that is made, and a title for it.
    """

    budget: int | str | None
    exact: bool = False
    plan: Plan | None = None
    stop_before_step: bool = False
    tell: Callable[[Plan, str], None] = lambda plan, title: print(f"{title}{plan}")


class Session:
    """One run of a script: finds the model, plans, measures. Use it as a context manager around the script."""

    def __init__(self, settings: Settings) -> None:
        """Check the budget against the machine before anything of the script runs."""
        self.settings = settings
        self.plan: Plan | None = settings.plan
        self.first_estimate: Estimate | None = None
        self.notes: list[str] = []
        self._made: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._optimizers: list[Optimizer] = []
        self._watch: StepWatch | None = None
        self._call: Call | None = None
        self._step: Profile | None = None
        self._model: nn.Module | None = None
        self._recomputation: Recomputation | None = None
        self._undo: list[Callable[[], None]] = []
        self._stop: SessionStop | None = None
        self._num_updates = self._depth = 0
        self._between = self._planning = False
        self._gradients: Literal["none", "forward", "step"] = "none"
        self._loss: torch.Tensor | None = None
        self._first_losses: list[torch.Tensor] = []
        self._last_losses: deque[torch.Tensor] = deque(maxlen=NUM_KEPT_LOSSES)
        self._stack = ExitStack()

    def __enter__(self) -> "Session":
        """Begin to listen: calls of modules, new optimisers, backward and optimiser steps."""
        listen = self._stack.enter_context
        listen(_replaced(Optimizer, "__init__", self._listen_for_optimizers))
        listen(_replaced(Optimizer, "zero_grad", self._listen_for_zero_grad))
        listen(_replaced(nn.Module, "zero_grad", self._listen_for_zero_grad))
        listen(_replaced(torch.autograd, "backward", self._listen_for_backward))
        self._calls = ExitStack()
        self._calls.enter_context(_replaced(nn.Module, "__call__", self._listen_for_calls))
        listen(self._calls)
        before = register_optimizer_step_pre_hook(lambda optimizer, *_: self._update_begins(optimizer))
        after = register_optimizer_step_post_hook(lambda optimizer, *_: self._update_ends(optimizer))
        self._stack.callback(before.remove)
        self._stack.callback(after.remove)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop listening, and undo the plan."""
        self._stack.close()
        if self._watch is not None:
            self._watch.close()
        self._undo_plan()

    @property
    def trained(self) -> bool:
        """Whether the script took an optimiser step on a model that was found."""
        return self._num_updates > 0

    def measurement(self) -> Measurement | None:
        """Return what was measured, None where nothing was trained."""
        if self._watch is None or not self.trained:
            return None
        losses = {"first": self._first_losses, "last": list(self._last_losses)}
        return self._watch.measurement({key: tuple(map(float, values)) for key, values in losses.items()})

    def _listen_for_optimizers(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            self._made.add(optimizer)

        return init

    def _listen_for_zero_grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(owner: Any, set_to_none: bool = True) -> None:
            if self._planning:
                pass
            elif self._watch is not None and not set_to_none:
                self._gradients = "step"
            elif self._between:
                self._gradients = "forward"
            original(owner, set_to_none)

        return zero_grad

    def _listen_for_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            watch = None if self._planning else self._watch
            if watch is not None:
                self._between = False
                self._note_loss(tensors)
                watch.backward_begins()
            original(tensors, *args, **kwargs)
            if watch is not None:
                watch.backward_ends()

        return backward

    def _listen_for_calls(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._depth == 0 and torch.is_grad_enabled() and self._watch is None:
                self._consider(module, Call(args, kwargs))
            self._depth += 1
            try:
                return original(module, *args, **kwargs)
            finally:
                self._depth -= 1

        return call

    def _consider(self, module: nn.Module, call: Call) -> None:
        """Take a module as the model if an optimiser holds parameters of it (step 1)."""
        own: set[torch.Tensor] = set(module.parameters())
        trained = [optimizer for optimizer in self._made if own.intersection(_parameters(optimizer))]
        if not trained:
            return
        self._refuse_other_models(module, own)
        self._calls.close()
        self._model, self._call, self._optimizers = _unwrapped(module), call, trained
        try:
            self._plan_before_first_step()
        except SessionStop as stop:
            self._stop = stop
            module.register_forward_pre_hook(lambda *_: self._stop_again())
            raise
        self._watch = StepWatch(module, trained)
        module.register_forward_hook(lambda *_: self._forward_ended())

    def _stop_again(self) -> None:
        if self._stop is not None:
            raise self._stop

    def _forward_ended(self) -> None:
        self._between = torch.is_grad_enabled() and self._num_updates == 0

    def _refuse_other_models(self, module: nn.Module, own: set[torch.Tensor]) -> None:
        others = [optimizer for optimizer in self._made if not own.intersection(_parameters(optimizer))]
        if others and self.settings.budget is not None:
            raise SessionStop(
                f"the script trains two models: {type(module).__name__}, and what {type(others[0]).__name__} steps. "
                "packlight run plans for one; call packlight.fit on each in the script",
                exit_status=2,
            )

    def _plan_before_first_step(self) -> None:
        if self.settings.budget is None:
            return
        if self.settings.plan is not None:
            self._carry_out(self.settings.plan)
            return
        step, plan = self._make_plan(Seen())
        self.first_estimate, self.plan = plan.estimate, plan
        self.settings.tell(plan, "")
        if self.settings.stop_before_step:
            raise SessionStop("planned", exit_status=0)
        assert self._model is not None
        self._recomputation = recompute(self._model, sorted(most_saving(step)))  # step 2
        self._step = step

    def _make_plan(self, seen: Seen) -> tuple[Profile, Plan]:
        assert self._model is not None and self._call is not None
        budget = Budget.of(self.settings.budget or 0, total_bytes=device_bytes(_device(self._model)))
        self._planning = True
        try:
            step = profile(self._model, self._call, self._optimizers, seen=seen)
            return step, solve(step, budget, exact=self.settings.exact)
        except BudgetError as error:
            raise SessionStop(str(error), exit_status=3, smallest_bytes=error.smallest_bytes) from None
        except ProfileError as error:
            raise SessionStop(str(error), exit_status=2) from error
        finally:
            self._planning = False

    def _update_begins(self, optimizer: Optimizer) -> None:
        if self._watch is None or self._planning:
            return
        if optimizer not in self._optimizers:
            self._meet(optimizer)
        self._watch.update_begins()
        if self._num_updates == 0 and self._recomputation is not None and optimizer is self._optimizers[0]:
            self._plan_again()

    def _meet(self, optimizer: Optimizer) -> None:
        """Take in an optimiser that was made after the first forward."""
        assert self._model is not None and self._watch is not None
        if set(self._model.parameters()).isdisjoint(_parameters(optimizer)):
            self._refuse_other_models(self._model, set[torch.Tensor](self._model.parameters()))
        self._optimizers.append(optimizer)
        self._watch.optimizers.append(optimizer)

    def _plan_again(self) -> None:
        """Plan with what step 1 has shown, and carry that out (step 3)."""
        assert self._watch is not None and self._recomputation is not None and self._step is not None
        watch, seconds = self._watch, self._watch.step_seconds_so_far()
        was_on = watch.pause()
        self._recomputation.remove()
        self._recomputation = None
        seen = Seen(
            tail=watch.tail(),
            num_microbatches=watch.num_microbatches,
            gradients="step" if watch.num_microbatches > 1 else self._gradients,
            other_bytes=watch.other_bytes,
            keeps_outputs=watch.outputs_alive(),
        )
        step, plan = self._make_plan(seen)
        plan = rescale(plan, seconds, predicted_step_seconds(step, most_saving(step)))
        if self.plan is not None and _decisions(plan) != _decisions(self.plan):
            self.settings.tell(plan, "after step 1, ")
        self.plan = plan
        self._carry_out(plan)
        if was_on:
            watch.resume()

    def _carry_out(self, plan: Plan) -> None:
        assert self._model is not None
        self._undo.append(recompute(self._model, sorted(plan.recomputed())).remove)
        for optimizer in self._optimizers:
            self._undo.append(adopt_formats(plan, self._model, optimizer))

    def _undo_plan(self) -> None:
        if self._recomputation is not None:
            self._recomputation.remove()
        while self._undo:
            self._undo.pop()()

    def _update_ends(self, optimizer: Optimizer) -> None:
        if self._watch is None or self._planning or optimizer not in self._optimizers:
            return
        self._watch.update_ends()
        if optimizer is self._optimizers[0]:
            self._num_updates += 1
            if self._loss is not None:
                kept = self._first_losses
                if len(kept) < NUM_KEPT_LOSSES:
                    kept.append(self._loss)
                self._last_losses.append(self._loss)
                self._loss = None

    def _note_loss(self, tensors: Any) -> None:
        """Keep the value that backward starts from; a step's microbatches are summed."""
        loss = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors), None)
        if loss is not None and loss.numel() == 1:
            value = loss.detach().reshape(())
            self._loss = value if self._loss is None else self._loss + value


def _decisions(plan: Plan) -> tuple[frozenset[str], Mapping[str, str]]:
    return plan.recomputed(), plan.state_formats


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside torch's own data-parallel wrapper."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    return module


@contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace an attribute by what `make` builds around it, until the end of the context."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
