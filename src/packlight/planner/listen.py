"""Hears what a script does with torch, without the script knowing: calls, optimisers, backward, steps.

torch has global hooks for forward (without keyword arguments) and for optimiser steps, and none for a new optimiser,
for `backward` or for `zero_grad`. For these a method is replaced while the script runs and put back at its end.
Nothing is decided here: a `Listener` is told.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from packlight.optim.adopt import adoption_of
from packlight.planner.loop import Call

NUM_KEPT_LOSSES = 10


class Listener:
    """What can be heard; a subclass overrides what it wants to know."""

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Hear of an optimiser that has just been made."""

    def called(self, module: nn.Module, call: Call) -> None:
        """Hear of the outermost module that is about to be called with gradients enabled."""

    def gradients_cleared(self, *, set_to_none: bool) -> None:
        """Hear of `zero_grad` of an optimiser or a module."""

    def backward_begins(self, tensors: Any) -> None:
        """Hear of a backward pass, with the tensors that it starts from."""

    def run_backward(self, backward: Callable[..., None], tensors: Any, *args: Any, **kwargs: Any) -> None:
        """Run a backward pass; a subclass may do it in its own way."""
        backward(tensors, *args, **kwargs)

    def backward_ends(self) -> None:
        """Hear of the end of a backward pass."""

    def update_begins(self, optimizer: Optimizer) -> None:
        """Hear of an optimiser that is about to step, before its own hooks run."""

    def update_ends(self, optimizer: Optimizer) -> None:
        """Hear of an optimiser that has stepped."""


class Ears:
    """The replaced methods and hooks that tell one listener; `close` puts everything back."""

    _is_open: ClassVar[bool] = False

    def __init__(self, listener: Listener) -> None:
        """Begin to listen.

        Raises:
            ValueError: another listener is told already, and two would plan against each other.
        """
        if Ears._is_open:
            raise ValueError(
                "a session is in force already; wanted one at a time: either packlight run, or one plugin in the script"
            )
        Ears._is_open = True
        self._listener = listener
        self._depth = 0
        self._stack, self._calls = ExitStack(), ExitStack()
        self._stack.callback(setattr, Ears, "_is_open", False)
        self._calls.enter_context(_replaced(nn.Module, "__call__", self._call))
        self._stack.enter_context(self._calls)
        for owner, name, make in (
            (Optimizer, "__init__", self._init),
            (Optimizer, "zero_grad", self._zero_grad),
            (nn.Module, "zero_grad", self._zero_grad),
            (torch.autograd, "backward", self._backward),
        ):
            self._stack.enter_context(_replaced(owner, name, make))
        begins = register_optimizer_step_pre_hook(self._update_begins)
        ends = register_optimizer_step_post_hook(lambda optimizer, *_: listener.update_ends(optimizer))
        self._stack.callback(begins.remove)
        self._stack.callback(ends.remove)

    def ignore_calls(self) -> None:
        """Stop listening to calls of modules; the rest goes on."""
        self._calls.close()

    def close(self) -> None:
        """Stop listening."""
        self._stack.close()

    def _update_begins(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Tell that an optimiser steps; where forward and backward are in a closure, when they are over."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._listener.update_begins(optimizer)
            return None
        return args[:1], {**kwargs, "closure": partial(self._evaluate, optimizer, closure)}

    def _evaluate(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        before, loss = adoption_of(optimizer), closure()
        self._listener.update_begins(optimizer)
        made = adoption_of(optimizer)
        if made is not None and made is not before:  # too late for a hook on this step
            made.step_now()
        return loss

    def _init(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def init(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            self._listener.optimizer_made(optimizer)

        return init

    def _zero_grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def zero_grad(owner: Any, set_to_none: bool = True) -> None:
            self._listener.gradients_cleared(set_to_none=set_to_none)
            original(owner, set_to_none)

        return zero_grad

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            self._listener.backward_begins(tensors)
            self._listener.run_backward(original, tensors, *args, **kwargs)
            self._listener.backward_ends()

        return backward

    def _call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._depth == 0 and torch.is_grad_enabled():
                self._listener.called(module, Call(args, kwargs))
            self._depth += 1
            try:
                return original(module, *args, **kwargs)
            finally:
                self._depth -= 1

        return call


class BackwardStandIn:
    """Stands in for `torch.autograd.backward` until `remove`; several may, and each can leave first."""

    def __init__(self, run: Callable[..., None]) -> None:
        """Call `run`, a method, with torch's own function and its arguments, as long as its object lives."""
        self._run, self._original, self._is_active = weakref.WeakMethod(run), torch.autograd.backward, True
        _set_backward(self)

    def __call__(self, tensors: Any, *args: Any, **kwargs: Any) -> None:
        """Run a backward pass."""
        run = self._run()
        if self._is_active and run is not None:
            run(self._original, tensors, *args, **kwargs)
        else:
            self._original(tensors, *args, **kwargs)

    def remove(self) -> None:
        """Put torch's own back; where another stands on top of this one, only step aside."""
        self._is_active = False
        while isinstance(top := torch.autograd.backward, BackwardStandIn) and not top._is_active:
            _set_backward(top._original)


def _set_backward(function: Callable[..., None]) -> None:
    torch.autograd.backward = function


class LossLog:
    """The values that backward started from, summed over a step's microbatches: the first and the last ten steps."""

    def __init__(self) -> None:
        """Begin without a step."""
        self._now: torch.Tensor | None = None
        self._first: list[torch.Tensor] = []
        self._last: deque[torch.Tensor] = deque(maxlen=NUM_KEPT_LOSSES)

    def note(self, tensors: Any) -> None:
        """Add what a backward pass starts from, if it is one scalar."""
        loss = tensors if isinstance(tensors, torch.Tensor) else next(iter(tensors), None)
        if loss is not None and loss.numel() == 1:
            value = loss.detach().reshape(()).clone()  # a reduced loss may stand in the storage of all its elements
            self._now = value if self._now is None else self._now + value

    def end_step(self) -> None:
        """Close a step."""
        if self._now is not None:
            if len(self._first) < NUM_KEPT_LOSSES:
                self._first.append(self._now)
            self._last.append(self._now)
            self._now = None

    def values(self) -> dict[str, tuple[float, ...]]:
        """Return the losses of the first and of the last steps."""
        return {"first": tuple(map(float, self._first)), "last": tuple(map(float, self._last))}


@contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace an attribute by what `make` builds around it, until the end of the context."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


class ModuleHook:
    """A hook of one module only; in a copy or a pickle of the module it does nothing, and needs no packlight."""

    def __init__(self, module: nn.Module, function: Callable[..., None]) -> None:
        """Call `function` with what the hook is given after the module."""
        self._module, self._function = module, function

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Call the function, unless the module is a copy."""
        if module is self._module:
            self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a function of the standard library that takes anything and returns None."""
        return getattr, (nullcontext(), "__exit__")
