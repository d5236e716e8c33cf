"""Backward in two stages: the loss down to the model's outputs, then the model; so that the second can be done again.

`loss.backward()` is one walk through one graph, and what fails in its middle leaves half of the gradients. The idea:
where the loss depends on the parameters by way of the model's outputs alone, the walk can be cut there without a change
of a bit, since autograd goes through later nodes first anyway. With the gradient at the outputs set aside, the model's
forward and its backward can be repeated, and the loss, which is the user's code, need not be.

```
forward ends       1 a root is tied to each output's node: it feeds it a gradient, and holds no output
backward begins    2 `obstacle` walks the graph: does anything but the outputs lead from the loss to parameters?
                   3 stage one: gradients at the outputs; the tail's part of the graph is used up
                   4 stage two: the roots hand them over and let go of them, as autograd itself would
```
"""

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from packlight.planner.tensors import flat_tensors

_Edge = tuple[Any, int]
_REENTRANT = "CheckpointFunctionBackward"


class Outputs:
    """The outputs of one forward, as what the model's own backward starts from."""

    def __init__(self, output: object) -> None:
        """Tie roots to them (step 1); nothing of the graph that the user has is changed."""
        tensors = [tensor for tensor in flat_tensors(output) if tensor.grad_fn is not None]
        self._edges: list[_Edge] = [tuple(get_gradient_edge(tensor))[:2] for tensor in tensors]  # type: ignore[misc]
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._hooks = [_hooks_of(tensor) for tensor in tensors]
        self._gradients: dict[int, torch.Tensor] = {}
        feeds = (_Feed.apply(self._gradients, at, tensor) for at, tensor in enumerate(tensors))  # type: ignore[no-untyped-call]
        self._roots: list[torch.Tensor] = list(feeds)

    def obstacle(self, loss: object, model: nn.Module) -> str:
        """Say why backward from a loss cannot go in two stages (step 2); nothing where it can."""
        if not isinstance(loss, torch.Tensor) or loss.grad_fn is None or not self._roots:
            return "backward starts from more than one loss, or from none that the model's outputs lead to"
        retained = any(tensor is not None and tensor.retains_grad for tensor in (each() for each in self._tensors))
        if retained or any(_is_foreign(hook) for table in self._hooks for hook in table.values()) or _has_hooks(model):
            return "the script has hooks on the model's gradients, or retains those of its outputs"
        start: _Edge = tuple(get_gradient_edge(loss))[:2]  # type: ignore[assignment]
        reached, leaves, _ = _walk(start, set(self._edges))
        if leaves or not reached:
            return "the loss depends on parameters by other ways than the outputs of the last forward"
        own = {id(parameter) for parameter in model.parameters()}
        for edge in reached:
            others, leaves, names = _walk(edge, reached - {edge})
            if others or _REENTRANT in names:
                return (
                    "outputs are made of one another" if others else "a part of the model is in a reentrant checkpoint"
                )
            if any(id(leaf) not in own for leaf in leaves):
                return "tensors that are no parameters of the model get gradients"
        return ""

    def find_gradients(self, loss: torch.Tensor) -> dict[int, torch.Tensor]:
        """Do stage one (step 3).

        Returns:
            The gradient of the loss by the position of each output that gets one; a function on the way may give none.
        """
        start: _Edge = tuple(get_gradient_edge(loss))[:2]  # type: ignore[assignment]
        reached, _, _ = _walk(start, set(self._edges))
        positions = {self._edges.index(edge): GradientEdge(*edge) for edge in reached}
        found: Sequence[torch.Tensor | None] = torch.autograd.grad([loss], [*positions.values()], allow_unused=True)
        return {at: gradient for at, gradient in zip(positions, found, strict=True) if gradient is not None}

    def run(
        self,
        backward: Callable[..., None],
        gradients: dict[int, torch.Tensor],
        *,
        inputs: Collection[torch.Tensor] | None = None,
    ) -> None:
        """Do stage two (step 4).

        Args:
            backward: torch's own.
            gradients: the gradients by position; taken out of the dictionary, so that nobody holds them longer.
            inputs: what gets gradients; None: everything.
        """
        roots, self._roots = [self._roots[at] for at in gradients], []
        if not roots:
            return
        self._gradients.update(gradients)
        gradients.clear()
        try:
            backward(roots, [torch.empty_like(root) for root in roots], inputs=inputs)
        finally:
            self._gradients.clear()

    def let_go(self, loss: torch.Tensor | None = None) -> None:
        """Drop the graph, also where the user's tensors hold it: they become constants."""
        self._roots, self._edges = [], []
        for tensor in (loss, *(reference() for reference in self._tensors)):
            if tensor is not None and tensor.grad_fn is not None and not tensor._is_view():
                tensor.detach_()


class _Feed(torch.autograd.Function):
    """An empty root over a tensor: its backward hands over the gradient that a dictionary has by then."""

    @staticmethod
    def forward(ctx: Any, gradients: dict[int, torch.Tensor], position: int, output: torch.Tensor) -> torch.Tensor:
        ctx.gradients, ctx.position = gradients, position
        return torch.empty(0, device=output.device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return None, None, ctx.gradients.pop(ctx.position)


def _walk(start: _Edge, stops: Collection[_Edge]) -> tuple[set[_Edge], list[torch.Tensor], set[str]]:
    """Go through a graph from an edge.

    Returns:
        The edges among `stops` that were met and not passed, the leaves and the names of the nodes that were passed.
    """
    reached, leaves, names = set[_Edge](), list[torch.Tensor](), set[str]()
    seen, waiting = set[Any](), [start]
    while waiting:
        edge = waiting.pop()
        node = edge[0]
        if edge in stops:
            reached.add(edge)
        elif node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            waiting += node.next_functions
    return reached, leaves, names


def _hooks_of(tensor: torch.Tensor) -> dict[int, Any]:
    """Return the table that hooks of a tensor stand in, now and later, also when nobody holds the tensor itself."""
    tensor.register_hook(lambda _: None).remove()
    table: dict[int, Any] = tensor._backward_hooks  # type: ignore[assignment]
    return table


def _is_foreign(hook: Any) -> bool:
    return not str(getattr(hook, "__module__", "")).startswith("packlight.")


def _has_hooks(model: nn.Module) -> bool:
    """Tell whether gradients of a model are looked at, or used, while backward runs."""
    parameters = ((each._backward_hooks, each._post_accumulate_grad_hooks) for each in model.parameters())
    modules = ((each._backward_hooks, each._backward_pre_hooks) for each in model.modules())
    return any(table for tables in (*parameters, *modules) for table in tables)
