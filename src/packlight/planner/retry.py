"""Out of memory in one of the first steps: a tighter plan, and the step's work once more, bit for bit the same.

An error of the allocator ends a script though a plan with less to hold would have gone through. Its step cannot simply
be repeated: random numbers are drawn, statistics moved, gradients half summed up. The idea: what failed is the model's
forward or its backward, and both start from little (`rewind.py`, `stages.py`).

```
forward fails    1 frames of the failed calls are cleared: what they saved is free
                 2 a tighter plan is carried out (`Tightener`)
                 3 random states and buffers go back; forward runs again
backward fails   1 so; the graph is dropped too
                 2 so
                 3 gradients that were none are none again; a sum that has been added to is complete, and left alone
                 4 random states and buffers go back; forward, then backward from the same gradients at the outputs
```
What cannot be repeated (hooks, two losses, a second backward through one graph) goes up as it came, with a note.
"""

import gc
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._C._functorch import get_interpreter_stack
from torch._dynamo.eval_frame import OptimizedModule

from packlight.activations.compiled import skipped
from packlight.activations.standin import StandIn
from packlight.planner.exhausted import Exhausted, is_out_of_memory
from packlight.planner.loop import Call
from packlight.planner.rewind import Aside, Drawn, Start
from packlight.planner.scope import num_elements
from packlight.planner.stages import Outputs
from packlight.planner.tensors import flat_tensors
from packlight.records import Plan


class Tightener(ABC):
    """Who has a plan in force, and can have a tighter one."""

    plan: Plan | None
    """The plan in force."""

    @abstractmethod
    def look(self, error: BaseException, where: str) -> Exhausted:
        """Look at what lives on the device, as long as the error's frames hold it."""

    @abstractmethod
    def backward_obstacle(self) -> str:
        """Say why a backward cannot be run again; nothing where it can."""

    @abstractmethod
    def tighten(self, failure: Exhausted) -> Iterator[None]:
        """Carry out a tighter plan at each turn, and say so; at least one turn."""


class Retry:
    """Stands around a model's forward and backward until `remove`; without `repeats` it repeats nothing."""

    def __init__(self, model: nn.Module, tightener: Tightener, *, repeats: bool = True) -> None:
        """Change the model's `forward`; `backward` has to be called in the place of torch's."""
        self._model, self._tightener = model, tightener
        self._pending: tuple[Start, Outputs] | None = None
        self._is_nested = False
        self._is_open = repeats and not isinstance(model, OptimizedModule)
        self._around: _Around | None = None
        self.stand_outermost()
        self.num_elements = 0

    def stand_outermost(self) -> None:
        """Stand around what was carried out meanwhile, too."""
        self.step_aside()
        if self._is_open:
            self._around = _Around(self._model, self)

    def step_aside(self) -> None:
        """Give the model its forward back until `stand_outermost`, so that what is carried out is not put on top."""
        if self._around is not None:
            self._around.remove()
            self._around = None

    def forget(self) -> None:
        """Let go of the forward whose backward has not come."""
        self._pending = None

    def remove(self) -> None:
        """Give the model its forward back; calling it again does nothing."""
        self._is_open = False
        self.forget()
        self.step_aside()

    def forward(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's forward, again where memory runs out."""
        self.forget()
        if self._is_nested or not torch.is_grad_enabled() or _is_elsewhere():
            return forward(*args, **kwargs)
        try:
            start = Start(self._model, Call(args, kwargs))
        except (OSError, RuntimeError, MemoryError):  # then nothing is repeated, and the note of an error says so
            return forward(*args, **kwargs)
        self.num_elements = max(self.num_elements, num_elements(start.call.shapes()))
        try:
            output = forward(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            failure = self._failure(error, "forward")
        else:
            return self._noted(start, output)
        return self._noted(start, self._forward_again(failure, start))

    def backward(self, backward: Callable[..., None], loss: Any, *args: Any, **kwargs: Any) -> None:
        """Run torch's own backward, in two stages where that is possible, and again where memory runs out."""
        if not self._is_open:
            return backward(loss, *args, **kwargs)
        pending, self._pending = self._pending, None
        is_plain = all(each is None or each is False for each in (*args, *kwargs.values()))
        if isinstance(loss, tuple | list) and len(loss) == 1:
            (loss,) = loss
        obstacle = "" if is_plain else "backward is more than the gradient of one loss"
        obstacle = obstacle or self._tightener.backward_obstacle() or self._obstacle(pending, loss)
        if pending is None or obstacle:
            with self._telling("backward", obstacle):
                return backward(loss, *args, **kwargs)
        start, outputs = pending
        del pending
        with self._telling("backward of the loss", "what the loss saves is the script's own"):
            gradients = outputs.find_gradients(loss)
        asides = _set_aside(gradients)
        before = {parameter: _state(parameter.grad) for parameter in self._model.parameters()}
        try:
            outputs.run(backward, gradients)
        except (RuntimeError, MemoryError) as error:
            failure = self._failure(error, "backward")
        else:
            return None
        outputs.let_go(loss)
        return self._backward_again(failure, backward, _Half(start, asides, before))

    def _noted(self, start: Start, output: Any) -> Any:
        """Keep what a second backward would start from, where the model's is all that there is."""
        arguments = flat_tensors((start.call.args, dict(start.call.kwargs)))
        if not _is_distributed() and not any(tensor.requires_grad for tensor in arguments):
            self._pending = start, Outputs(output)
        return output

    def _obstacle(self, pending: tuple[Start, Outputs] | None, loss: Any) -> str:
        if pending is None:
            return (
                "its forward was not the last one, is the first of a larger batch, has arguments that get gradients, "
                "is compiled, runs on several processes, or what it starts from could not be noted"
            )
        return pending[1].obstacle(loss, self._model)

    def _forward_again(self, failure: Exhausted, start: Start) -> Any:
        obstacle = start.obstacle() or ("it runs on several processes" if _is_distributed() else "")
        for _ in () if obstacle else self._turns(failure):
            try:
                return self._repeat(start)
            except (RuntimeError, MemoryError) as error:
                self._failure(error, "forward")
        raise self._told(failure, obstacle)

    def _backward_again(self, failure: Exhausted, backward: Callable[..., None], half: "_Half") -> None:
        obstacle, drawn = half.start.obstacle(), Drawn()
        if half.asides is None:
            obstacle = "the gradients at the model's outputs could not be set aside in the folder for temporary files"
        for _ in () if obstacle else self._turns(failure):
            half.reset()
            outputs = None
            try:
                outputs = Outputs(self._repeat(half.start))
                half.finish(outputs, backward)
                drawn.put_back()
                return
            except (RuntimeError, MemoryError) as error:
                self._failure(error, "backward")
            if outputs is not None:
                outputs.let_go()
        raise self._told(failure, obstacle)

    def _turns(self, failure: Exhausted) -> Iterator[None]:
        turns = self._tightener.tighten(failure)
        while True:
            try:
                next(turns)
            except StopIteration:
                return
            except Exception as error:
                raise self._told(failure, f"no tighter plan could be carried out ({error})") from error
            self.stand_outermost()
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            yield

    def _repeat(self, start: Start) -> Any:
        """Run the whole forward under what is carried out now, from the same start."""
        start.rewind()
        self._is_nested = True
        try:
            with start.call.autocasting(), torch.enable_grad():
                return self._model.forward(*start.call.args, **start.call.kwargs)
        finally:
            self._is_nested = False

    def _failure(self, error: BaseException, where: str) -> Exhausted:
        """Read what lives, then free what the failed calls hold; any other error goes on its way."""
        if not is_out_of_memory(error):
            raise error
        failure = self._tightener.look(error, where)
        clear_frames(error)
        return failure

    def _told(self, failure: Exhausted, obstacle: str) -> BaseException:
        """Add to an error what a user can do now."""
        tried = f"it could not be repeated: {obstacle}" if obstacle else "the most saving plan failed too"
        failure.error.add_note(failure.told(self._tightener.plan, tried=tried))
        return failure.error

    @contextmanager
    def _telling(self, where: str, obstacle: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self._told(self._tightener.look(error, where), obstacle)
            raise


class _Around(StandIn):
    """Stands in for the model's `forward`."""

    def __init__(self, model: nn.Module, retry: Retry) -> None:
        super().__init__(model)
        self._retry = retry

    @skipped
    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self.forward_of(module)
        return self._retry.forward(forward, args, kwargs) if module is self._module else forward(*args, **kwargs)


_State = tuple[int, int] | None


@dataclass
class _Half:
    """What the second stage of a backward starts from, and how far it came.

    Attributes:
        start: what the model's forward started from.
        asides: the gradients at its outputs, by position; None where they could not be set aside.
        before: what each parameter's gradient was, by identity and version.
    """

    start: Start
    asides: dict[int, Aside] | None
    before: dict[nn.Parameter, _State]

    def reset(self) -> None:
        """Drop the gradients that were none before (step 3)."""
        for parameter, state in self.before.items():
            if state is None:
                parameter.grad = None

    def finish(self, outputs: Outputs, backward: Callable[..., None]) -> None:
        """Run the rest of it: a parameter gets its gradient once in a backward, so a sum that changed is complete."""
        trained = [parameter for parameter in self.before if parameter.requires_grad]
        left = [parameter for parameter in trained if self.before[parameter] == _state(parameter.grad)]
        if left:
            gradients = {at: aside.back() for at, aside in (self.asides or {}).items()}
            outputs.run(backward, gradients, inputs=left if len(left) < len(trained) else None)


def clear_frames(error: BaseException | None) -> None:
    """Free what the frames of an error hold, and those of the errors that led to it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _set_aside(gradients: dict[int, torch.Tensor]) -> dict[int, Aside] | None:
    try:
        return {at: Aside(gradient) for at, gradient in gradients.items()}
    except (OSError, RuntimeError, MemoryError):
        return None


def _state(gradient: torch.Tensor | None) -> _State:
    return None if gradient is None else (id(gradient), gradient._version)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_elsewhere() -> bool:
    """Tell whether a forward is no step's own: inside backward, a transform of torch.func or a compiled graph."""
    return torch._C._current_graph_task_id() != -1 or bool(get_interpreter_stack()) or torch.compiler.is_compiling()
