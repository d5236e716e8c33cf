"""A block's second run leaves the world as the first run did: lists, swapped parameters, generators, attributes."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from packlight.activations import find_blocks, recompute
from packlight.planner.loop import Call
from packlight.planner.repeats import unrepeatable


class Appends(nn.Module):
    """Writes an auxiliary loss into the caller's list."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, losses: list[Tensor]) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        losses.append(y.square().mean())
        return x + y


class Collector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Appends() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        losses: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, losses)
        assert len(losses) == len(self.layers)
        return x.mean() + torch.stack(losses).sum()


class Noisy(nn.Module):
    """Draws from numpy's generator in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return torch.tanh(y) * float(np.random.random())


class Counts(nn.Module):
    """Keeps state in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        y: Tensor = torch.tanh(self.inner(x)) / self.num_calls
        return y


def gradients(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    loss = step(model)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def assert_same_bits(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> None:
    again = copy.deepcopy(model)
    plain = gradients(model, step)
    with recompute(again):
        recomputed = gradients(again, step)
    assert len(plain) == len(recomputed) > 1
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def test_what_a_block_writes_into_the_callers_list_arrives_once(seed: int) -> None:
    torch.manual_seed(seed)
    inputs = torch.randn(4, 8)
    assert_same_bits(Collector(), lambda model: model(inputs))


def test_a_block_draws_the_same_from_numpys_generator_again(seed: int) -> None:
    torch.manual_seed(seed)
    inputs = torch.randn(4, 8)

    def step(model: nn.Module) -> Tensor:
        np.random.seed(seed % 2**32)
        out: Tensor = model(inputs).sum()
        return out

    assert_same_bits(nn.Sequential(*[Noisy() for _ in range(3)]), step)


def test_parameters_that_were_put_in_place_for_a_call_are_there_again(seed: int) -> None:
    torch.manual_seed(seed)
    inputs = torch.randn(4, 8)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)])
    others = {name: torch.randn_like(value, requires_grad=True) for name, value in model.named_parameters()}

    def step() -> list[Tensor]:
        loss = torch.func.functional_call(model, others, (inputs,)).sum()
        return list(torch.autograd.grad(loss, list(others.values())))

    plain = step()
    own = list(model.parameters())
    with recompute(model):
        recomputed = step()
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))
    assert all(one is other for one, other in zip(own, model.parameters(), strict=True))


def test_a_block_that_counts_in_an_attribute_is_named_as_one_that_cannot_be_recomputed() -> None:
    model = nn.Sequential(*[Counts() for _ in range(3)])
    paths = [block.path for block in find_blocks(model)]
    refused = unrepeatable(model, Call((torch.ones(2, 8),)), paths)
    assert set(refused) == set(paths)
    assert all("num_calls" in reason for reason in refused.values())
    assert all(layer.num_calls == 0 for layer in model)


@pytest.mark.parametrize("kind", [Noisy, nn.Linear])
def test_other_blocks_are_not_refused(kind: type[nn.Module]) -> None:
    model = nn.Sequential(*[Noisy() if kind is Noisy else nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
    paths = [block.path for block in find_blocks(model)]
    assert unrepeatable(model, Call((torch.ones(2, 8),)), paths) == {}
