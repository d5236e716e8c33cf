"""Sees what a loop allocates between the model's forward and its backward: the tail of a step.

The loss is often computed in the user's own code, and with a large vocabulary it is the step's peak. The idea: live
bytes are read at four marks that every loop passes, and the highest point between two of them is noted.

```
forward ends                               the live bytes that the others are counted from
   |  the loss: forward peak
backward begins                            what the loss saved; from here on, without outputs that are gone by now
   |  the loss's own backward: backward peak
a gradient reaches the model's outputs
   |  the model's backward
backward ends
   |  clipping, unscaling: after backward
the optimiser begins                       what the loop still holds
```
"""

import weakref
from dataclasses import dataclass

import torch

from packlight.planner.tensors import flat_tensors
from packlight.planner.timeline import Timeline
from packlight.step import Tail


@dataclass
class _Marks:
    """Live bytes at the marks, and the highest points between them, above the end of forward."""

    forward_end_bytes: int = 0
    forward_peak_bytes: int = 0
    saved_bytes: int = 0
    backward_peak_bytes: int = 0
    backward_end_bytes: int = 0
    after_backward_bytes: int = 0
    carried_bytes: int = 0


class TailWatch:
    """Follows the marks of each microbatch on one line of events; bytes are the most over all of them.

    Attributes:
        held_outputs: which of the model's output tensors the loop held when backward began; None: all of them.
    """

    def __init__(self, line: Timeline) -> None:
        """Read live bytes from `line`."""
        self._line, self._marks = line, _Marks()
        self.held_outputs: tuple[int, ...] | None = None
        self._outputs: list[int] = []
        self._made_of: dict[int, set[int]] = {}
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        self._sizes: dict[int, tuple[int, int]] = {}
        self._gone_bytes = 0

    def forward_ends(self, output: object) -> None:
        """Note the live bytes, and watch for the gradient at the outputs."""
        self._marks.forward_end_bytes = self._line.live_bytes
        self._line.highest_bytes()
        tensors = list(flat_tensors(output))
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._storages = [weakref.ref(storage) for storage in storages]
        followed = [at for at, tensor in enumerate(tensors) if self._line.index(tensor) is not None]
        self._sizes = {storages[at]._cdata: (at, self._line.round(storages[at].nbytes())) for at in followed}
        self._made_of = _made_of(tensors)
        self._outputs = []
        for position in self._made_of:
            tensors[position].register_hook(lambda _, position=position: self._gradient_arrives(position))

    def backward_begins(self) -> None:
        """Note what the loss has allocated, and which outputs are still held."""
        marks, start = self._marks, self._marks.forward_end_bytes
        marks.forward_peak_bytes = max(marks.forward_peak_bytes, self._line.highest_bytes() - start)
        living = self.living_outputs()
        self._gone_bytes = sum(size for at, size in self._sizes.values() if at not in living)
        marks.saved_bytes = max(marks.saved_bytes, self._line.live_bytes - start + self._gone_bytes)
        self.held_outputs = None if len(living) == len(self._storages) else living

    def backward_ends(self) -> None:
        """Note the live bytes."""
        self._marks.backward_end_bytes = self._line.live_bytes
        self._line.highest_bytes()

    def update_begins(self) -> None:
        """Note what was allocated since backward, and what of the loss the loop holds on to."""
        marks = self._marks
        above_bytes = self._line.highest_bytes() - marks.backward_end_bytes
        marks.after_backward_bytes = max(marks.after_backward_bytes, above_bytes)
        marks.carried_bytes = self._line.unfinished_bytes("loss")

    def living_outputs(self) -> tuple[int, ...]:
        """Return which of the tensors that the model returned last somebody still holds, by position."""
        return tuple(at for at, storage in enumerate(self._storages) if storage() is not None)

    def tail(self) -> Tail:
        """Return what was seen; never less than nothing."""
        marks = self._marks
        return Tail(
            outputs=tuple(sorted(self._outputs)),
            forward_peak_bytes=max(0, marks.forward_peak_bytes),
            saved_bytes=max(0, marks.saved_bytes),
            backward_peak_bytes=max(0, marks.backward_peak_bytes),
            after_backward_bytes=max(0, marks.after_backward_bytes),
            carried_bytes=marks.carried_bytes,
        )

    def _gradient_arrives(self, position: int) -> None:
        """Note an output that the loss was computed from, and at the first the highest point so far."""
        if not self._outputs:
            above_bytes = self._line.highest_bytes() - self._marks.forward_end_bytes + self._gone_bytes
            self._marks.backward_peak_bytes = max(self._marks.backward_peak_bytes, above_bytes)
        from_inside = any(position in self._made_of[other] for other in self._outputs)
        if position not in self._outputs and not from_inside:
            self._outputs.append(position)


def _made_of(tensors: list[torch.Tensor]) -> dict[int, set[int]]:
    """Tell for each output with a graph which other outputs it was computed from (a loss from logits).

    A gradient that reaches an output by way of another one is the model's own affair.

    Returns:
        The positions of the other outputs that it was made of, by its own position.
    """
    nodes = {tensor.grad_fn: at for at, tensor in enumerate(tensors) if tensor.grad_fn is not None}
    reached: dict[int, set[int]] = {}
    for start, position in nodes.items():
        reached[position], seen, waiting = set(), {start}, [start]
        while waiting and len(nodes) > 1:
            following = {node for node, _ in waiting.pop().next_functions if node is not None} - seen
            seen |= following
            waiting += following
            reached[position] |= {nodes[node] for node in following if node in nodes}
    return reached
