"""Values that follow from the batch's integers alone are known while a step is traced, and no others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight.planner.loop import Call, Seen
from packlight.planner.profile import profile
from packlight.planner.trace import Trace

pytestmark = pytest.mark.usefixtures("seed")


class Asks(nn.Module):
    """Computes something from the batch and remembers what it saw."""

    def __init__(self, ask: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.ask, self.saw = ask, None

    def forward(self, tokens: Tensor) -> Tensor:
        self.saw = self.ask(tokens)
        out: Tensor = self.linear(tokens.float()).sum()
        return out


def traced(ask: Callable[[Tensor], Any], tokens: Tensor) -> Any:
    trace = Trace(Asks(ask), None, Seen())
    with trace.active():
        call = trace.fake_call(Call.of(tokens))
        trace.mark_resident(call, Seen())
        trace.forward(call)
        return trace.model.saw


QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "all": lambda tokens: bool((tokens > 0).all()),
    "item": lambda tokens: tokens.max().item(),
    "list": lambda tokens: tokens.sum(-1).tolist(),
    "equal": lambda tokens: torch.equal(tokens, tokens.flip(0)),
    "view then write": lambda tokens: write(tokens.clone()),
    "positions": lambda tokens: bool((torch.arange(4).expand_as(tokens).diff(dim=-1) == 1).all()),
    "full": lambda tokens: torch.full((3,), 2).sum().item() + torch.zeros(2, dtype=torch.long).sum().item(),
    "shape of nonzero": lambda tokens: tuple(tokens.nonzero().shape),
    "shape of a selection": lambda tokens: tuple(tokens[tokens > 1].shape),
    "shape of unique": lambda tokens: tuple(tokens.unique().shape),
}


def write(tokens: Tensor) -> int:
    tokens.view(-1)[2:4].fill_(9)
    return int(tokens.sum().item())


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_about_the_batch_has_its_true_answer(question: str) -> None:
    tokens = torch.randint(0, 5, (3, 4))
    before = tokens.clone()
    ask = QUESTIONS[question]
    assert traced(ask, tokens) == ask(tokens.clone())
    assert torch.equal(tokens, before), "the batch itself was written to"


UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "floats": lambda tokens: bool(tokens.float().exp().sum() > 0),
    "drawn": lambda tokens: torch.randint(0, 5, (3,)).sum().item(),
    "written over": lambda tokens: overwritten(tokens.clone()),
}


def overwritten(tokens: Tensor) -> int:
    view = tokens.view(-1)
    tokens.copy_(torch.rand(tokens.shape).mul(5).long())
    return int(view.sum().item())


@pytest.mark.parametrize("question", UNKNOWN)
def test_a_question_about_other_values_is_refused(question: str) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException

    with pytest.raises(DataDependentOutputException):
        traced(UNKNOWN[question], torch.randint(0, 5, (3, 4)))


def test_what_is_known_takes_no_bytes_on_the_line() -> None:
    tokens = torch.randint(0, 5, (64, 4))
    quiet, asking = Asks(lambda tokens: (tokens > 0).all().dim()), Asks(QUESTIONS["all"])
    assert profile(quiet, tokens).storages == profile(asking, tokens).storages


def test_transformers_own_test_for_fake_tensors_is_put_back() -> None:
    from transformers.utils import import_utils

    before = import_utils.is_fake_tensor
    profile(Asks(QUESTIONS["all"]), torch.randint(0, 5, (3, 4)))
    assert import_utils.is_fake_tensor is before
