"""What is known of the loop around a model: how it calls the model, and what it keeps alive between steps.

A model's forward is half of a step; the other half is the user's own code. These two records say what a trace has to
know of it, whether the user told it or a real first step showed it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from packlight.planner.tensors import flat_tensors
from packlight.step import Tail

TAIL_BYTES = ("forward_peak_bytes", "saved_bytes", "backward_peak_bytes", "carried_bytes")

Loss = Callable[[Any, Any], torch.Tensor]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def listed(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    """Return one optimiser, several or none as a list."""
    if optimizers is None:
        return []
    return [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield what an optimiser steps."""
    for group in optimizer.param_groups:
        yield from group["params"]


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside torch's own data-parallel wrapper."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    return module


AUTOCAST_TYPES = ("cpu", "cuda")


def _autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """Return the types of device for which autocast is on now, with its dtype."""
    return tuple((at, torch.get_autocast_dtype(at)) for at in AUTOCAST_TYPES if torch.is_autocast_enabled(at))


@dataclass(frozen=True)
class Call:
    """How the model is called in a step; it remembers the autocast that it is made under."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    autocast: tuple[tuple[str, torch.dtype], ...] = field(default_factory=_autocast_state)

    @classmethod
    def of(cls, batch: Any) -> "Call":
        """Read a batch: a mapping is `model(**batch)`, a tuple `model(*batch)`, anything else `model(batch)`."""
        if isinstance(batch, Call):
            return batch
        if isinstance(batch, Mapping):
            return cls(kwargs=dict(batch))
        return cls(tuple(batch)) if isinstance(batch, tuple) else cls((batch,))

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of all tensors in the arguments."""
        return tuple(tuple(tensor.shape) for tensor in flat_tensors((self.args, dict(self.kwargs))))

    @contextmanager
    def autocasting(self) -> Iterator[None]:
        """Run under the call's autocast; casts that it cached for tensors of the trace are dropped at the end."""
        with ExitStack() as stack:
            on = dict(self.autocast)
            for device_type in AUTOCAST_TYPES:
                dtype = on.get(device_type)
                stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=dtype is not None))
            yield
        torch.clear_autocast_cache()


@dataclass(frozen=True)
class Seen:
    """What is known of the loop around the model, from the user or from a real first step.

    Attributes:
        tail: what the loss outside the model allocates; None: trace `loss`, the model's own, or a guess.
        state_bytes: what the optimiser's states were seen to take; used where its step cannot be traced.
        num_microbatches: forward and backward passes for one optimiser step.
        num_forwards: forward passes for one backward (two towers of one model, a pair of inputs).
        gradients: how long gradients of the step before (or of earlier microbatches) live on: "none" where they are
            gone before forward, "forward" where they go between forward and backward, "step" where backward adds to
            them.
        other_bytes: bytes of tensors that are not of the model and the optimiser; None: buffers and the batch.
        held_outputs: which of the model's output tensors the loop holds while backward runs, by position; None: all.
        carries_outputs: whether it still holds them when the next step begins.
        param_dtype: in which an engine will use parameters and take arguments; None: as they are.
    """

    tail: Tail | None = None
    state_bytes: int | None = None
    num_microbatches: int = 1
    num_forwards: int = 1
    gradients: Literal["none", "forward", "step"] = "none"
    other_bytes: int | None = None
    held_outputs: tuple[int, ...] | None = None
    carries_outputs: bool = True
    param_dtype: torch.dtype | None = None

    def for_batches(self, ratio: float) -> "Seen":
        """Return what is to be expected when batches are larger by a ratio: the loss grows with them."""
        if self.tail is None:
            return self
        sizes = {name: math.ceil(getattr(self.tail, name) * ratio) for name in TAIL_BYTES}
        return replace(self, tail=replace(self.tail, **sizes))
