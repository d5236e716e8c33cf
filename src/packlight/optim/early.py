"""Updates inside backward for an optimiser that exists already, so that gradients need not live side by side.

`release.py` does this for packlight's own optimisers. A script that builds torch.optim.AdamW calls its `step` after
backward, when all gradients are there. Here a hook takes each gradient as soon as it is complete, lets the optimiser's
own code step that parameter alone, and frees the gradient; the script's `step` then finds nothing to do.

    1 backward accumulates a gradient   2 the hook steps its parameter and frees the gradient
    3 the script's step: nothing has a gradient; from then on each parameter may come again

A parameter is stepped alone by a stand-in of the optimiser's class that shares its state and has one param group with
one parameter: the same arithmetic, so the same bits.

Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), ACL 2024
(arXiv 2306.09782), section 3 (the idea).
"""

from collections.abc import Callable, Mapping
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

from packlight.optim.adopt import Adoption, unhooked_step

ALONE = (ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop)
"""The optimisers of torch that step each parameter from its own gradient and state alone."""


class EarlyUpdates:
    """What `update_early` returns: undone by `remove()`, or at the end of a with statement."""

    def __init__(self, optimizer: Optimizer, adoption: Adoption | None) -> None:
        self._optimizer, self._adoption = optimizer, adoption
        self._done: set[Tensor] = set()
        pairs = [(param, group) for group in optimizer.param_groups for param in group["params"]]
        self._hooks: list[Any] = [
            param.register_post_accumulate_grad_hook(self._updating(group))
            for param, group in pairs
            if param.requires_grad
        ]
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self._refuse_scaling()))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._done.clear()))

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

    def _updating(self, group: Mapping[str, Any]) -> Callable[[Tensor], None]:
        return lambda param: self._update(param, group)

    @torch.no_grad()
    def _update(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Step one parameter and free its gradient (step 2)."""
        if param in self._done:
            param.grad = None  # or the next step would use it
            raise RuntimeError(
                f"gradients are released, and a second one came for a parameter of shape {tuple(param.shape)} "
                "before step(): they cannot be accumulated when each is used and freed at once. Parameters have the "
                "first gradient's update; this one has been dropped. Plan without release_gradients"
            )
        self._done.add(param)
        if self._adoption is None or not self._adoption.update(param, group):
            unhooked_step(_alone(self._optimizer, param, group))
        param.grad = None

    def _refuse_scaling(self) -> None:
        if self._done and getattr(self._optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "gradients are released, and a GradScaler came: this step's updates have been done inside backward, "
                "by scaled and unchecked gradients. Load model and optimiser from a checkpoint, or build them anew, "
                "and plan without release_gradients"
            )


def update_early(optimizer: Optimizer, adoption: Adoption | None = None) -> EarlyUpdates:
    """Step each parameter of an existing optimiser inside backward, and free its gradient there.

    There are no gradients after backward: what clips, counts or logs them finds none.

    Args:
        optimizer: one of `ALONE`; the object, its class and its `step` stay what they are.
        adoption: what `adopt` returned for it, if it did.

    Returns:
        The handle: `remove()` undoes it.

    Raises:
        ValueError: `can_update_early` gives a reason.
        RuntimeError: (in backward) a second gradient comes before `step`; (in `step`) a GradScaler is used.

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
