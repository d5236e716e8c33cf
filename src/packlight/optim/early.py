"""Updates inside backward for an optimiser that exists already, so that gradients need not live side by side.

`release.py` does this for packlight's own optimisers. A script that builds torch.optim.AdamW calls its `step` after
backward, when all gradients are there. Here a hook takes each gradient as soon as it is complete, lets the optimiser's
own code step that parameter alone, and frees the gradient; the script's `step` then finds nothing to do.

    1 backward accumulates a gradient   2 the hook steps its parameter and frees the gradient
    3 the script's step: nothing has a gradient; from then on each parameter may come again

So every backward is a step, with the settings (learning rate) that it finds. What would go wrong unseen is refused: a
second gradient before step 3, settings that were changed before it, clipping, a GradScaler, several processes.

A parameter is stepped alone by a stand-in of the optimiser's class that shares its state and has one param group with
one parameter: the same arithmetic, so the same bits.

Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), ACL 2024
(arXiv 2306.09782), section 3 (the idea).
"""

import functools
import math
import time
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from torch.utils._python_dispatch import _disable_current_modes

from packlight.optim.adopt import Adoption, unhooked_step
from packlight.optim.refusals import refuse_what_needs_gradients

ALONE = (ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop)
"""The optimisers of torch that step each parameter from its own gradient and state alone."""


NUM_TIMED = 20


class EarlyUpdates:
    """What `update_early` returns: undone by `remove()`, or at the end of a with statement."""

    def __init__(self, optimizer: Optimizer, adoption: Adoption | None) -> None:
        self._optimizer, self._adoption = optimizer, adoption
        self._done: set[Tensor] = set()
        self._used: dict[int, dict[str, Any]] = {}
        self._hooked: set[Tensor] = set()
        self._hooks: list[Any] = []
        self.extend()
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._check_settings()))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._close_round()))
        self._hooks.append(refuse_what_needs_gradients())

    def extend(self) -> None:
        """Take in parameters that get gradients since."""
        for number, group in enumerate(self._optimizer.param_groups):
            for param in group["params"]:
                if param.requires_grad and param not in self._hooked:
                    update = functools.partial(self._update, number=number)
                    self._hooks.append(param.register_post_accumulate_grad_hook(update))
                    self._hooked.add(param)

    def remove(self) -> None:
        """Let the optimiser step as before; calling it again does nothing."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Self:
        """Return the handle."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Remove the hooks."""
        self.remove()

    @torch.no_grad()
    def _update(self, param: Tensor, *, number: int) -> None:
        """Step one parameter and free its gradient (step 2)."""
        if param in self._done:
            param.grad = None  # or the next step would use it
            raise RuntimeError(
                f"gradients are released, and a second one came for a parameter of shape {tuple(param.shape)} before "
                "step(): they cannot be accumulated, and a backward cannot be dropped, when each gradient is used and "
                "freed at once. Parameters have the first one's update. Call step() after each backward(), or plan "
                "without release_gradients; after a backward that failed, load a checkpoint"
            )
        group = self._optimizer.param_groups[number]  # of now: loading a state dict replaces it
        self._used.setdefault(number, _settings(group))
        self._done.add(param)
        if self._adoption is None or not self._adoption.update(param, group):
            unhooked_step(_alone(self._optimizer, param, group))
        param.grad = None

    def _check_settings(self) -> None:
        """Refuse settings that were changed between backward and `step`: the updates have been done without them."""
        for number, used in self._used.items():
            changed = [name for name, value in _settings(self._optimizer.param_groups[number]).items()
                       if not _is_same(used.get(name), value)]  # fmt: skip
            if changed:
                raise RuntimeError(
                    f"gradients are released, and {changed[0]!r} of a param group was changed between backward() and "
                    "step(): this step's updates were done inside backward, with the former value. Set it before "
                    "backward(), or plan without release_gradients"
                )

    def _close_round(self) -> None:
        self._done.clear()
        self._used.clear()


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return bool(one == other)


def update_early(optimizer: Optimizer, adoption: Adoption | None = None) -> EarlyUpdates:
    """Step each parameter of an existing optimiser inside backward, and free its gradient there.

    There are no gradients after backward: what counts or logs them finds none. While this is in force torch's functions
    that clip gradients, and `GradScaler.scale`, raise an error.

    Args:
        optimizer: one of `ALONE`; the object, its class and its `step` stay what they are.
        adoption: what `adopt` returned for it, if it did.

    Returns:
        The handle: `remove()` undoes it.

    Raises:
        ValueError: `can_update_early` gives a reason.
        RuntimeError: (in backward) a second gradient comes before `step`; (in `step`) settings were changed since.

    Example:
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with update_early(optimizer):
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     optimizer.step()
        >>> model.weight.grad is None
        True
    """
    reason = can_update_early(optimizer)
    if reason is not None:
        raise ValueError(f"gradients cannot be released: {reason}; plan without release_gradients")
    return EarlyUpdates(optimizer, adoption)


def can_update_early(optimizer: Optimizer) -> str | None:
    """Tell why an optimiser's parameters cannot be stepped one by one inside backward; None if they can."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes sum up their gradients after they are complete"
    if type(optimizer) not in ALONE:
        return f"the optimiser is a {type(optimizer).__name__}, and may need all gradients at once"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "a param group has differentiable=True"
    return None


def _alone(optimizer: Optimizer, param: Tensor, group: Mapping[str, Any]) -> Optimizer:
    """Return a stand-in of the same class that steps one parameter, with the optimiser's own state."""
    made: Optimizer = object.__new__(type(optimizer))
    made.__dict__ = {**optimizer.__dict__, "param_groups": [{**group, "params": [param]}]}
    return made


@functools.cache
def alone_seconds() -> float:
    """Measure what a step of one parameter takes that does almost nothing (milliseconds, once in a process)."""
    with _disable_current_modes(), torch.no_grad():
        param = torch.nn.Parameter(torch.ones(1))
        param.grad = torch.ones(1)
        optimizer = AdamW([param], foreach=False)
        (group,) = optimizer.param_groups
        best = math.inf
        for _ in range(NUM_TIMED):
            start = time.perf_counter()
            unhooked_step(_alone(optimizer, param, group))
            best = min(best, time.perf_counter() - start)
        return best
