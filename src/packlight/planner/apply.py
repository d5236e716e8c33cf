"""Does what a plan says, in place and undone by one handle.

PyTorch's wrappers (checkpoint_wrapper, FSDP) change a model's class or its tree, and with it the names in a checkpoint.
Here nothing that a script can see changes: recomputed blocks get another `forward` on the instance, states change their
format under the optimiser that is already there, and `remove` puts everything back. `apply` decides nothing.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn

from packlight.budget import Budget
from packlight.measurement import Measurement
from packlight.memory import Memory
from packlight.planner.carry import Adopted, adopt_formats, carry_out
from packlight.planner.cut import agreement_of
from packlight.planner.listen import BackwardStandIn
from packlight.planner.loop import Call, Loss
from packlight.planner.measure import StepWatch
from packlight.planner.mend import Mend
from packlight.planner.microbatches import split
from packlight.planner.places import level_of_user
from packlight.planner.plan import profiled
from packlight.planner.released import as_planned
from packlight.planner.scope import num_elements
from packlight.records import Plan
from packlight.step import Profile


class Applied:
    """A plan in force; `remove` undoes it. Also a context manager."""

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        step: Profile | None = None,
        num_elements: int | None = None,
    ) -> None:
        """Carry the plan out; nothing is changed where a part of it cannot be.

        Args:
            plan: the plan.
            model: the model.
            optimizer: its optimiser.
            step: the profile that the plan was made from, from which it can be mended once.
            num_elements: of the arguments that it was made for; None where that is not known.

        Raises:
            ValueError: the plan is for a pipeline, or names what the model or the optimiser does not have.
        """
        if plan.pipeline is not None:
            raise ValueError("the plan is for the stages of a pipeline, not for one model; make one by packlight.plan")
        self.plan, self._model = plan, model
        self._notes: list[str] = []
        self._carried = carry_out(plan, model)
        self._adopted: Adopted | None = None
        self._undo: list[Callable[[], None]] = [self._put_back]
        try:
            if optimizer is not None:
                self._adopted = adopt_formats(plan, model, optimizer)
                self._undo.append(self._adopted.remove)
            self._watch = StepWatch(model, [optimizer] if optimizer is not None else [])
            self._undo.append(self._watch.close)
        except BaseException:
            self.remove()
            raise
        if optimizer is not None:  # else nothing tells where a step ends
            self._watch.attach(optimizer)
            self._begin_to_mend(None if step is None else as_planned(step, plan), num_elements)
            self._follow(optimizer)

    @property
    def measurement(self) -> Measurement | None:
        """What happened so far, beside `plan.estimate`; None before the first step is complete."""
        measured = self._watch.measurement()
        if not measured.num_steps:
            return None
        completed = replace(self._carried.complete(measured), notes=tuple(self._notes))
        return completed if self._adopted is None else self._adopted.complete(completed)

    @property
    def measured(self) -> Memory | None:
        """What lived over the step in which the measured peak stands; None before the first step is followed."""
        return self._watch.lived.now()[1]

    def _repr_html_(self) -> str:
        """Show the plan in a notebook, and below it what happened so far."""
        measured = self.measurement
        return self.plan._repr_html_() + ("" if measured is None else measured._repr_html_())

    def microbatches(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """Yield the parts of a batch that the plan is for, each with its share of the rows.

        The gradient of the mean over the batch is the sum of `(loss of part * share)`'s, where the loss of a part is a
        mean over its rows.

        Args:
            batch: a mapping, a tuple or one tensor; tensors with as many rows as most are split, all else goes along.

        Returns:
            An iterator over the parts.
        """
        return split(batch, self.plan.num_microbatches)

    def _begin_to_mend(self, step: Profile | None, num_elements: int | None) -> None:
        """Repeat what fails for want of memory in the first steps, and hold their peak against the plan."""
        agreement = agreement_of(self._model).in_step()
        told: Any = {"change": self._change, "tell": _warn, "note": self._note}
        self._mend = Mend(self._model, self._watch, num_steps=2, agreement=agreement, **told)
        self._mend.begin(self.plan, step, num_elements=num_elements)
        self._backward = BackwardStandIn(self._mend.backward)
        self._undo += [self._backward.remove, self._mend.remove]

    def _follow(self, optimizer: torch.optim.Optimizer) -> None:
        begins = optimizer.register_step_pre_hook(lambda *_: self._mend.forget())
        ends = optimizer.register_step_post_hook(lambda *_: self._step_ends())
        self._undo += [begins.remove, ends.remove]

    def _step_ends(self) -> None:
        self._mend.step_ends()
        if not self._mend.is_retrying():
            self._backward.remove()

    def _change(self, plan: Plan) -> None:
        self._mend.step_aside()
        self._put_back()
        self._carried, self.plan = carry_out(plan, self._model), plan

    def _note(self, _: Plan, said: str) -> None:
        """Keep what is no reason to warn for the measurement."""
        self._notes.append(said.rstrip(" ,:"))

    def _put_back(self) -> None:
        self._carried.remove()

    def remove(self) -> None:
        """Give blocks and optimiser back as they were (states are decoded to fp32); again it does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        """Return the handle itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Undo."""
        self.remove()


def apply(plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Applied:
    """Carry a plan out on a model and its optimiser, in place.

    Args:
        plan: what `plan` or `Plan.load` returned, for this model.
        model: the module that is trained.
        optimizer: the optimiser that the plan was made for.

    Returns:
        A handle: `handle.measurement` after the first steps, `handle.remove()` to undo it.

    Raises:
        ValueError: the plan names blocks or parameters that the model or the optimiser does not have.
    """
    return Applied(plan, model, optimizer)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    batch: Any,
    *,
    budget: int | str | Budget,
    loss: Loss | None = None,
    host_budget: int | str | None = None,
    disk: str | None = None,
    exact: bool = False,
    release_gradients: bool = False,
    max_microbatches: int = 1,
) -> Applied:
    """Plan and apply: make a training step fit a byte budget.

    Args:
        model: the module that is trained.
        optimizer: the optimiser that steps; None for forward and backward alone.
        batch: what the model takes, as for `plan`.
        budget: bytes allowed on the training device at the step's peak, as for `plan`.
        loss: a function of (output, batch) that returns a scalar, as for `plan`.
        host_budget: bytes allowed in host memory, as for `plan`.
        disk: folder of the disk tier, as for `plan`.
        exact: only choices that leave every loss and gradient bit-equal.
        release_gradients: parameters may be stepped inside backward, as for `plan`.
        max_microbatches: a batch may be split into so many parts, as for `plan`.

    Returns:
        The handle of `apply`.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that would.

    >>> model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(8)])
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> batch = torch.ones(4096, 64)
    >>> with fit(model, optimizer, batch, budget="20MiB", loss=lambda output, _: output.sum()) as handle:
    ...     for _ in range(3):
    ...         output = model(batch)
    ...         output.sum().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...     handle.measurement.device_peak_bytes <= 20 * 2**20
    True
    """
    step, plan = profiled(
        model,
        batch,
        optimizer,
        budget=budget,
        loss=loss,
        host_budget=host_budget,
        disk=disk,
        exact=exact,
        release_gradients=release_gradients,
        max_microbatches=max_microbatches,
    )
    part, _ = next(split(batch, plan.num_microbatches))
    return Applied(plan, model, optimizer, step=step, num_elements=num_elements(Call.of(part).shapes()))


def _warn(plan: Plan, said: str) -> None:
    warnings.warn(f"packlight: {said}{plan}", stacklevel=level_of_user())
