"""What a loop allocates around its loss, seen in one step, is what the next step takes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from packlight.planner.cost import StepCost
from packlight.planner.hardware import measure
from packlight.planner.measure import StepWatch
from packlight.planner.profile import profile
from tests.cases import GPT, NUM_BYTES, windows

pytestmark = pytest.mark.usefixtures("seed")


class Loop:
    """Trains a small language model whose logits are larger than anything else."""

    def __init__(self) -> None:
        self.model = GPT(width=8, num_layers=2)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.watch = StepWatch(self.model, [self.optimizer], num_measured=4)
        self.watch.attach(self.optimizer)
        self.tokens = windows(8, 33)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())

    def backward(self, loss: Tensor) -> None:
        self.watch.backward_begins()
        loss.backward()
        self.watch.backward_ends()

    def lets_go(self) -> None:
        """The logits have no name: they are gone when the loss is there."""
        self.backward(self.cross_entropy(self.model(self.tokens[:, :-1])))

    def holds(self) -> None:
        logits = self.model(self.tokens[:, :-1])
        self.backward(self.cross_entropy(logits))

    def holds_half(self) -> None:
        """Of the loss a copy lives on, and the logits do not."""
        half = self.model(self.tokens[:, :-1]).half()
        self.backward(self.cross_entropy(half.float()))


@pytest.mark.parametrize("name", ["lets_go", "holds", "holds_half"])
def test_the_next_steps_peak_is_predicted_but_for_two_scalars_whatever_becomes_of_the_logits(name: str) -> None:
    measure("cpu")  # what it leaves behind would be met in a later step
    loop = Loop()
    step, optimizer = getattr(loop, name), loop.optimizer
    for _ in range(2):  # in the second the states are there
        step()
        seen = loop.watch.seen("none")
        optimizer.step()
        optimizer.zero_grad()
    with loop.watch.aside():
        made = profile(loop.model, loop.tokens[:, :-1], optimizer, seen=seen)
    loop.watch.plan_begins()
    step()
    optimizer.step()
    optimizer.zero_grad()
    measured = loop.watch.measurement()
    predicted = StepCost(made).price((), made.optimizers[0])
    assert measured.plan_peak_bytes is not None
    assert 0 <= predicted.peak_bytes - measured.plan_peak_bytes <= 8  # the loss and its gradient stand for themselves
    logits_bytes = 4 * NUM_BYTES * loop.tokens[:, 1:].numel()
    assert predicted.peak_bytes > 3 * logits_bytes
    loop.watch.close()
