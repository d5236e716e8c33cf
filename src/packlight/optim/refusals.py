"""Refuses what would find no gradients, or scaled ones, while they are used and freed inside backward.

`torch.nn.utils.clip_grad_norm_` takes parameters without gradients for a model that needs no clipping and returns 0,
and a GradScaler multiplies a loss long before any optimiser hears of it. Both would change the training without a word.
So the functions that they go through stand behind ones that raise, as long as somebody asks for that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad

_clip: Any = clip_grad
_INSIDE = ("_get_total_norm", "_group_tensors_by_device_and_dtype")
"""What `clip_grad_norm_` and `clip_grad_value_` call with the gradients that they found (torch 2.11 to 2.13)."""


class Refusal:
    """One who asks for the refusals; `remove` ends it, and the last one's puts torch's own functions back."""

    _num_active = 0
    _originals: dict[str, Callable[..., Any]]

    def __init__(self) -> None:
        self._is_active = True
        Refusal._num_active += 1
        if Refusal._num_active == 1:
            _stand_in()

    def remove(self) -> None:
        """Ask no longer; again it does nothing."""
        if self._is_active:
            self._is_active = False
            Refusal._num_active -= 1
            if Refusal._num_active == 0:
                _step_back()


def refuse_what_needs_gradients() -> Refusal:
    """Let clipping of gradients that are not there, and scaling of losses, raise an error until `remove`.

    Returns:
        The handle.
    """
    return Refusal()


def _stand_in() -> None:
    Refusal._originals = {name: getattr(_clip, name) for name in _INSIDE} | {"scale": GradScaler.scale}
    for name in _INSIDE:
        setattr(_clip, name, _refusing_to_clip(Refusal._originals[name]))
    GradScaler.scale = _refusing_to_scale(Refusal._originals["scale"])  # type: ignore[method-assign]


def _step_back() -> None:
    for name in _INSIDE:
        setattr(_clip, name, Refusal._originals[name])
    GradScaler.scale = Refusal._originals["scale"]  # type: ignore[method-assign]


def _refusing_to_clip(original: Callable[..., Any]) -> Callable[..., Any]:
    def function(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        found = list(tensors)
        if not any(isinstance(each, torch.Tensor) or each for each in found):
            raise RuntimeError(
                "gradients are released: they were used and freed inside backward, and there are none to clip. Plan "
                "without release_gradients"
            )
        return original(found, *args, **kwargs)

    return function


def _refusing_to_scale(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale(scaler: GradScaler, outputs: Any) -> Any:
        if scaler.is_enabled():
            raise RuntimeError(
                "gradients are released: they are used inside backward, before a GradScaler could undo its scale or "
                "look for infinities. Plan without release_gradients, or train in bfloat16 without a scaler"
            )
        return original(scaler, outputs)

    return scale
