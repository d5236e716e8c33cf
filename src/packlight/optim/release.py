"""Updates inside backward: each gradient is used and freed as soon as it is complete.

PyTorch keeps all gradients until `optimizer.step()`, as many bytes as the parameters. A hook runs right after a
parameter's gradient has been accumulated, so the update can happen there and the gradient be freed: at any time
there are the gradients of a few layers.

    1 backward accumulates a gradient   2 the hook updates the parameter and frees the gradient
    3 `step` closes the round: from then on the parameter may come again

What needs all gradients at once cannot be had with it: accumulation over several backward passes, clipping by
the norm, and a GradScaler, which looks for infinities before any update. Accumulation shows at the second gradient, a
GradScaler and `clip_coefficient` only in `step`, after the updates; the errors say what has been done by then.
torch.nn.utils.clip_grad_norm_ never shows: it finds no gradients and returns 0. So all of it is said at the start.

Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), ACL 2024
(arXiv 2306.09782), section 3 (the idea).
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable

from torch import Tensor

from packlight.optim.stepping import Scalars


class Release:
    """The hooks of one optimiser; they go when it goes.

    Args:
        update: the optimiser's method that does one parameter's step.
    """

    def __init__(self, update: Callable[[Tensor], None]) -> None:
        _warn_once()
        self._method = weakref.WeakMethod(update)
        self._done: set[Tensor] = set()

    def watch(self, params: Iterable[Tensor]) -> None:
        """Update these parameters in backward from now on."""
        for param in params:
            if param.requires_grad:
                hook = param.register_post_accumulate_grad_hook(self._update)
                weakref.finalize(self._method().__self__, hook.remove)  # type: ignore[union-attr]

    def close_round(self, scalars: Scalars) -> None:
        """Let the parameters come again.

        Args:
            scalars: what the step was to do with the gradients.

        Raises:
            RuntimeError: it was to scale, clip or check them.
        """
        self._done.clear()
        if scalars == Scalars():
            return
        came, gradients = "a clip coefficient", "unclipped"
        if scalars.found_inf is not None:
            came, gradients = "a GradScaler", "scaled and unchecked"
        raise RuntimeError(
            f"release_gradients=True updates parameters inside backward, but step() came with {came}. This round's "
            f"updates have been done already, by {gradients} gradients: load model and optimiser from a checkpoint, or "
            "build them anew, and build the optimiser without release_gradients."
        )

    def _update(self, param: Tensor) -> None:
        update = self._method()
        if update is None:
            return
        if param in self._done:
            param.grad = None  # or the next step would use it
            raise RuntimeError(
                f"release_gradients=True got a second gradient for a parameter of shape {tuple(param.shape)} "
                "before step(): gradients cannot be accumulated when each is used and freed at once. "
                "Parameters have the first gradient's update; this one has been dropped. Call step() after each "
                "backward(), or build the optimiser without release_gradients."
            )
        self._done.add(param)
        update(param)
        param.grad = None


@functools.cache
def _warn_once() -> None:
    """Say what release_gradients takes away, as clipping would fail without a word."""
    warnings.warn(
        "release_gradients=True updates parameters inside backward: there are no gradients after it. "
        "torch.nn.utils.clip_grad_norm_ and clip_grad_value_ find none then and clip nothing, a norm of them is 0; "
        "step(clip_coefficient=...), GradScaler and accumulation over several backward passes are refused. Build the "
        "optimiser without release_gradients where you need any of these.",
        stacklevel=5,
    )
