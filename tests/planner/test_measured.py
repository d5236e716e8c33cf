"""A run in which nothing is planned is measured as it is: packlight itself keeps nothing of it alive."""

import gc
import weakref

import pytest
import torch
from torch import nn

from packlight.planner.guest import Guest
from tests.cases import GPT, windows

pytestmark = pytest.mark.usefixtures("seed")


def test_a_batch_lives_no_longer_than_the_loop_holds_it() -> None:
    model, batches = GPT(), list[weakref.ref[torch.Tensor]]()
    optimizer = torch.optim.AdamW(model.parameters())
    with Guest(None).during(optimizer):
        for _ in range(4):
            tokens = windows(2, 17)[:, :-1].contiguous()
            batches.append(weakref.ref(tokens))
            model(tokens).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            gc.collect()
            assert [batch() is not None for batch in batches] == [False] * (len(batches) - 1) + [True]


def test_a_model_with_sparse_gradients_trains_with_the_same_bits() -> None:
    def train(*, is_measured: bool) -> list[float]:
        torch.manual_seed(0)
        table, head = nn.EmbeddingBag(1000, 16, sparse=True), nn.Linear(16, 2)
        model, losses = nn.Sequential(table, head), []
        optimizers = [torch.optim.SparseAdam(list(table.parameters())), torch.optim.AdamW(head.parameters())]
        with Guest(None if is_measured else "1GiB").during(*optimizers):
            for _ in range(5):
                ids = torch.randint(1000, (32, 8))
                loss = nn.functional.cross_entropy(model(ids), ids[:, 0] % 2)
                loss.backward()
                losses.append(loss.item())
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        return losses

    assert train(is_measured=True) == train(is_measured=False)


def test_an_optimiser_inside_another_one_of_the_same_parameters_is_traced() -> None:
    """As sharpness-aware minimisation is written: the outer one steps twice with the inner one's help."""

    class Outer(torch.optim.Optimizer):
        def __init__(self, params: list[nn.Parameter]) -> None:
            super().__init__(params, {})
            self.inner = torch.optim.AdamW(params)

        def step(self, closure: None = None) -> None:  # type: ignore[override]
            self.inner.step()

    model = GPT()
    optimizer = Outer(list(model.parameters()))
    with Guest("1GiB").during(optimizer, optimizer.inner) as guest:
        for _ in range(3):
            model(windows(2, 17)[:, :-1]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert guest.plan is not None and not [note for note in guest.plan.notes if "cannot be traced" in note]
