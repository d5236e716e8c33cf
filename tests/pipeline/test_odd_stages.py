"""Gradients stay those of the model alone whatever a stage does with its inputs and outputs; all of it is moved."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from packlight.activations.offload import HostTier
from packlight.pipeline import Runtime, Stage, uniform
from tests.pipeline.real import with_copies

pytestmark = pytest.mark.usefixtures("seed", "alone")

CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())  # type: ignore[attr-defined]
    yield
    torch.distributed.destroy_process_group()


class Kept(torch.autograd.Function):
    """Keeps what it gets and returns as attributes, where no hook sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x, ctx.y = x, x.exp()
        made: Tensor = ctx.y
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        made: Tensor = gradient * ctx.y + 0 * ctx.x
        return made


class Odd(nn.Module):
    """A linear layer, and what is done with it."""

    def __init__(self, does: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.layer, self.does = nn.Linear(8, 8), does

    def forward(self, *inputs: Tensor) -> Any:
        return self.does(self.layer, inputs[0] if len(inputs) == 1 else inputs)


def two(layer: nn.Module, x: Any) -> Any:
    x = x[0] * x[1] if isinstance(x, tuple) else x
    return layer(x).tanh(), x


STAGES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "its input": lambda layer, x: x,
    "two outputs": two,
    "in place at its end": lambda layer, x: torch.relu_(layer(x)),
    "checkpointed": lambda layer, x: checkpoint(lambda z: layer(z).tanh(), x, use_reentrant=False) + x,
    "attributes": lambda layer, x: Kept.apply(layer(Kept.apply(0.1 * x))),  # type: ignore[no-untyped-call]
    "a view": lambda layer, x: layer(x).view(-1).view(x.shape),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_do_what_they_like_with_what_they_get(name: str) -> None:
    modules = [Odd(STAGES[name]) for _ in range(3)] + [Odd(lambda layer, x: layer(x[0] if isinstance(x, tuple) else x))]
    whole, x = copy.deepcopy(nn.ModuleList(modules)), torch.randn(8, 8)
    stages = [Stage(module, at, 4, CPU, min_bytes=0) for at, module in enumerate(modules)]
    schedule, loss_fn = with_copies(uniform(1, 4, 4), 4), nn.functional.mse_loss
    with Runtime(stages, schedule, loss_fn=loss_fn, tier=HostTier(device=CPU)) as runtime:
        for _ in range(2):
            for module in modules:
                module.zero_grad()
            runtime.step(x, target=x, return_outputs=False)
        assert runtime.tier_traffic().bytes_out > 0 or name == "its input"  # such stages save nothing
    for part in x.split(2):
        made: Any = (part,)
        for each in whole:
            made = each(*made)
            made = made if isinstance(made, tuple) else (made,)
        loss_fn(made[0], part).backward()
    for mine, theirs in zip(nn.ModuleList(modules).parameters(), whole.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            assert torch.equal(mine.grad, theirs.grad / 4)
