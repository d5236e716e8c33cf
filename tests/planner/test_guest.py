"""What a plugin leaves behind: states in fp32 where there is room, else in few bits, and training goes on."""

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from packlight.optim.adopted_state import CompactState
from packlight.planner.guest import Guest
from packlight.planner.process import resident_bytes
from tests.torchrun import python

pytestmark = pytest.mark.usefixtures("seed")
ROOT = Path(__file__).parents[2]
WIDTH = 3072
ROOM_BYTES = 24 * 2**20
"""Enough for what a thread or a small tensor takes, and less than a moment of the large parameter in fp32."""


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process have little more memory than it has; what is large is asked of the system, which refuses."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (resident_bytes("VmSize") + ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 8))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 8)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(*, has_room: bool) -> tuple[list[float], dict[str, bool]]:
    """Train under a plugin and without it afterwards; return losses, and which states stayed in few bits."""
    torch.manual_seed(0)
    model, optimizer = training()
    with ExitStack() as at_the_end, Guest(13 * WIDTH**2).during(optimizer) as guest:
        losses = steps(model, optimizer, 4)
        assert guest.plan is not None and set(guest.plan.state_formats.values()) & {"4bit", "8bit"}
        if not has_room:
            at_the_end.enter_context(little_memory())
            at_the_end.enter_context(pytest.warns(UserWarning, match="optimiser states stay where and as they are"))
    stayed = {name: isinstance(optimizer.state[each], CompactState) for name, each in model.named_parameters()}
    losses += steps(model, optimizer, 3)
    assert {float(state["step"]) for state in optimizer.state.values()} == {7.0}
    return losses, stayed


def test_states_go_back_to_fp32_or_stay_in_few_bits_where_memory_runs_out_and_training_goes_on() -> None:
    # In a process of its own: in one that has run other tests, memory of theirs may be given back meanwhile.
    python("-c", "from tests.planner.test_guest import check; check()", cwd=ROOT, timeout_seconds=300)


def check() -> None:
    losses, stayed = train(has_room=True)
    assert not any(stayed.values())
    others, left = train(has_room=False)
    assert left["1.weight"] and not left["0.weight"]  # which came first, and is small
    assert others[:5] == losses[:5] and others == pytest.approx(losses, rel=1e-2)
