"""What stands in for a module's forward, on the instance: its hooks stay outside, and its class stays what it is.

PyTorch has wrappers, which change a model's tree and the names in its checkpoints, and patches of a class, which
change models that nobody meant. An attribute of the instance does neither, but brings four traps:

    copies          `copy.copy` and DataParallel's replicas share the attribute, so it is called for modules that it
                    was not made for; the module is then the one whose `__call__` called, and its own forward runs
    copies, pickles deep ones get the plain forward
    order           several may stand on one module; each can leave first
    torch.func      differentiates by means that know neither saved-tensor hooks nor checkpoints: an error says so
"""

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FrameType, MethodType
from typing import Any

import torch
from torch import nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.nn.modules import module as torch_module

from packlight.activations.compiled import skipped

_DIFFERENTIATING = (TransformType.Grad, TransformType.Jvp)
# Between a module's __call__ and a stand-in's: torch's `inner`, dynamo's wrapper, ours.
_MOST_FRAMES = 3


class StandIn(ABC):
    """Stands in for a module's `forward` until `remove`; a copy or a pickle of the module gets the plain forward.

    Args:
        module: the module; changed in place.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own = "forward" in module.__dict__  # not the class's
        self._forward = module.forward
        self._is_active = True
        functools.update_wrapper(self, self._forward, updated=())  # another stand-in's attributes are not ours
        module.__dict__["forward"] = self

    @torch._dynamo.disable(recursive=False, reason="packlight stands around this forward")  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module that is being called."""
        module = _calling_module(sys._getframe(1))
        return self.call_for(self._module if module is None else module, *args, **kwargs)

    @skipped
    def call_for(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of a module: the one that this was made for, or a shallow copy of it."""
        if not self._is_active:
            return self.forward_of(module)(*args, **kwargs)
        return self.run(module, args, kwargs)

    @abstractmethod
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what is to be done around the forward."""

    @skipped
    def forward_of(self, module: nn.Module) -> Callable[..., Any]:
        """Return the forward that a module would have without this."""
        forward = self._forward
        if isinstance(forward, StandIn):
            return functools.partial(forward.call_for, module)
        if isinstance(forward, MethodType) and forward.__self__ is self._module:
            return MethodType(forward.__func__, module)
        return forward

    def remove(self) -> None:
        """Put the former forward back; where another stands on top of this one, only step aside."""
        self._is_active = False
        attributes = self._module.__dict__
        while isinstance(top := attributes.get("forward"), StandIn) and not top._is_active:
            del attributes["forward"]
            if top._own:
                attributes["forward"] = top._forward

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave packlight out of copies and pickles."""
        return (functools.partial, (self._forward,)) if self._own else (getattr, (self._module, "forward"))


def stand_ins(module: nn.Module) -> list[StandIn]:
    """Return what stands in for a module's forward, the outermost first."""
    found: list[StandIn] = []
    forward = module.__dict__.get("forward")
    while isinstance(forward, StandIn):
        found.append(forward)
        forward = forward._forward
    return [each for each in found if each._is_active]


def is_transformed() -> bool:
    """Tell whether a transform of torch.func runs, such as `vmap`, which leaves autograd as it is.

    Returns:
        Whether one does.

    Raises:
        RuntimeError: one runs that differentiates.
    """
    transforms = get_interpreter_stack()
    if transforms and any(each.key() in _DIFFERENTIATING for each in transforms):
        raise RuntimeError(
            "a model with packlight's saved-tensor hooks came into a transform of torch.func that differentiates "
            "(grad, vjp, jvp and what is made of them), which knows no such hooks; call remove() on the handle before, "
            "or use torch.autograd"
        )
    return bool(transforms)


@skipped
def _calling_module(frame: FrameType | None) -> nn.Module | None:
    """Return the module whose `__call__` is calling; None where `forward` was called by its name."""
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return None
        if frame.f_code.co_filename == torch_module.__file__:
            module = frame.f_locals.get("self")
            return module if isinstance(module, nn.Module) else None
        frame = frame.f_back
    return None
