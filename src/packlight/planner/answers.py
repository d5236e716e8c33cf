"""What a real forward answered to questions that fake tensors cannot answer.

A model that routes tokens to experts, or drops what is small, has shapes and branches that hang on the values of
activations. No trace without values can know them. The idea: one real forward, in which nothing is saved, answers
every such question, and the trace takes the answers in the order in which they came:

    real forward   1 random states and buffers are noted    2 it runs without gradients; each answer is written down
                   3 what was noted is put back
    trace          4 the n-th question of forward has the n-th answer
                   5 a block's second run begins where its first run began

The trace is then right for the batch that was asked about; another batch may select more or fewer.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from packlight.planner.chatter import quiet
from packlight.planner.loop import Call
from packlight.planner.rewind import Start

_aten = torch.ops.aten
INDEXED = {
    *(_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default),
    _aten._unsafe_index.Tensor,
}
"""Operators that take masks as indices."""


class PathError(RuntimeError):
    """The trace asked something else than the real forward."""


def asks(func: Any) -> bool:
    """Tell whether an operator's result has a value or a size that no fake tensor can tell, but for `masks_of`."""
    if func in INDEXED:
        return False
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def masks_of(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """Return the masks that an operator takes as indices."""
    if func not in INDEXED or len(args) < 2:
        return []
    return [at for at in args[1] if isinstance(at, Tensor) and at.dtype in (torch.bool, torch.uint8)]


@dataclass(frozen=True)
class _Answer:
    """One answer, and what was asked.

    Attributes:
        question: the operator and the shapes of its tensors.
        value: its result, integers and booleans with values on the CPU, other tensors on the meta device; for masks
            how many places each selects.
    """

    question: tuple[Any, ...]
    value: Any


class Answers:
    """The answers of one real forward, in their order."""

    def __init__(self) -> None:
        """Begin without any."""
        self._answers: list[_Answer] = []
        self._next = 0
        self._again: list[int] = []

    @classmethod
    def of(cls, model: nn.Module, call: Call, then: Callable[[Any, Call], Any]) -> "Answers":
        """Run a model's forward on real tensors, and put back what it changes (steps 1 to 3).

        Args:
            model: on a device that has memory; a plain attribute that its forward changes stays changed.
            call: how it is called; the model gets copies of the tensors in it.
            then: what follows with the output and the copied call, up to the loss.

        Returns:
            The answers.

        Raises:
            RuntimeError: the forward wrote to a parameter or a large buffer, of which there is no copy.
        """
        made = cls()
        with _disable_current_modes(), torch.no_grad(), quiet():
            start = Start(model, call)
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (call.args, dict(call.kwargs)))
            own = replace(call, args=args, kwargs=kwargs)
            try:
                with _Writer(made), _Lists(), call.autocasting():
                    then(model(*args, **kwargs), own)
                obstacle = start.obstacle()
            finally:
                start.rewind()
        if obstacle:
            raise RuntimeError(obstacle)
        return made

    def write_places(self, func: Any, masks: Sequence[Tensor]) -> None:
        """Note how many places masks select, before an operator takes them."""
        self._answers.append(_Answer(_question(func, masks), [int(mask.count_nonzero()) for mask in masks]))

    def write(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note what an operator answered, if it was asked anything."""
        if asks(func):
            value = tree_map_only(Tensor, _without_floats, out)
            self._answers.append(_Answer(_question(func, (args, kwargs)), value))

    def begin(self) -> None:
        """Start anew, for another trace."""
        self._next = 0
        self._again.clear()

    def is_in_order(self) -> bool:
        """Tell whether questions come as in the real forward: in forward, and in a block's second run."""
        return bool(self._again) or torch._C._current_graph_task_id() == -1

    def take(self, func: Any, arguments: Any) -> Any:
        """Return the next answer (step 4); outside of the order none.

        Args:
            func: the operator.
            arguments: those that hold the tensors that it was noted with.

        Raises:
            PathError: the next answer is to another question.
        """
        if not self.is_in_order():
            return None
        at = self._again[-1] if self._again else self._next
        if at >= len(self._answers) or self._answers[at].question != _question(func, arguments):
            raise PathError(f"on fake tensors the forward took another path than on real ones, at {func}")
        if self._again:
            self._again[-1] += 1
        else:
            self._next += 1
        return self._answers[at].value

    def around(self, block: str) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
        """Return what makes the contexts of a block's two runs (step 5), for `recompute`."""

        def make() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            began: list[int] = []
            return self._first_run(began), self._second_run(began)

        return make

    @contextmanager
    def _first_run(self, began: list[int]) -> Any:
        began.append(self._next)
        yield

    @contextmanager
    def _second_run(self, began: list[int]) -> Any:
        self._again.append(began[0])
        try:
            yield
        finally:
            self._again.pop()


class _Writer(TorchDispatchMode):
    """Writes answers down while operators run."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answers = answers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = masks_of(func, args)
        if masks:
            self._answers.write_places(func, masks)
        out = func(*args, **(kwargs or {}))
        self._answers.write(func, args, kwargs or {}, out)
        return out


class _Lists(TorchFunctionMode):
    """Makes a list of a real tensor as one is made of a fake one: by asking for each element."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return _listed(args[0])
        return func(*args, **(kwargs or {}))


def _listed(tensor: Tensor) -> Any:
    return tensor.item() if tensor.dim() == 0 else [_listed(each) for each in tensor.unbind()]


def _question(func: Any, arguments: Any) -> tuple[Any, ...]:
    tensors = (each for each in tree_leaves(arguments) if isinstance(each, Tensor))
    return (func, *((tuple(each.shape), each.dtype) for each in tensors))


def _without_floats(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    if tensor.is_floating_point() or tensor.is_complex():
        return detached.to("meta")
    return detached.to("cpu", copy=True)
