"""What the engine is tested with: exact choices, a layer of routed experts, a tier in memory that notes its calls."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packlight.activations.blocks import find_blocks
from packlight.activations.engine import Engine
from packlight.activations.offload import make_tier
from packlight.activations.tier import OffloadError, Traffic
from tests.cases import CASES, Case, MoE, _next_byte, windows

CPU = torch.device("cpu")
NUM_STEPS = 2


def _everywhere(choice: str) -> Callable[[nn.Module], dict[str, str]]:
    return lambda _: {"*": choice}


def _recompute(model: nn.Module) -> dict[str, str]:
    return {block.path: "recompute" for block in find_blocks(model)}


def _half(model: nn.Module) -> dict[str, str]:
    return {"*": "offload"} | {block.path: "recompute" for block in find_blocks(model)[::2]}


def _mixed(model: nn.Module) -> dict[str, str]:
    """Recompute the blocks, but for most saves in them; stars make these patterns longer than any block's."""
    any_module = "*" * 40
    within = {f"{any_module}:0": "offload", f"{any_module}:1": "keep", f"{any_module}:[23]": "compress"}
    return _recompute(model) | within


#: Choices that lose nothing, by name: what makes them for a model, all with the codec "mask".
EXACT: dict[str, Callable[[nn.Module], dict[str, str]]] = {
    "keep": _everywhere("keep"),
    "recompute": _recompute,
    "offload": _everywhere("offload"),
    "compress": _everywhere("compress"),
    "compress+offload": _everywhere("compress+offload"),
    "recompute half, offload half": _half,
    "recompute, offload, keep and compress in each block": _mixed,
}
DISK = ("offload", "recompute, offload, keep and compress in each block")


def engine(model: nn.Module, how: str, **others: Any) -> Engine:
    """Carry out exact choices, for the smallest tensors too."""
    choices, device = EXACT[how](model), next(model.parameters()).device
    offloads = any("offload" in each for each in choices.values())
    tier = make_tier("host" if device.type == "cuda" else "disk", device=device) if offloads else None
    return Engine(model, choices, **({"codec": "mask", "tier": tier, "min_bytes": 0} | others))


def everywhere(model: nn.Module, choice: str, **others: Any) -> Engine:
    """Make one choice for all that a model saves, for the smallest tensors too."""
    tier = make_tier("disk", device=CPU) if "offload" in choice else None
    return Engine(model, {"*": choice}, **({"tier": tier, "min_bytes": 0} | others))


class Experts(nn.Module):
    """Each token goes to the expert that its router likes best: as many rows as the data says, often none."""

    def __init__(self, width: int, num_experts: int = 6) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x).flatten(0, 1)
        gates, chosen = (4 * self.router(flat)).softmax(dim=-1).max(dim=-1)
        out = torch.zeros_like(flat)
        for at, expert in enumerate(self.experts):
            rows = (chosen == at).nonzero().squeeze(1)
            gated = gates[rows, None] * expert(flat.index_select(0, rows))
            out = out.index_add(0, rows, gated.to(out.dtype))
        return x + out.view_as(x)


MODELS: dict[str, Callable[[], Case]] = {
    **CASES,
    "experts": lambda: Case(MoE(16, layer=Experts), windows(2, 16), _next_byte),
}


def twins(name: str) -> tuple[Case, Case]:
    """Build a case twice, with the same weights and the same batch."""
    case = MODELS[name]()
    return case, Case(copy.deepcopy(case.model), case.batch, case.loss)


Context = Callable[[], Any]


@contextmanager
def bf16(device_type: str = "cpu") -> Iterator[None]:
    with torch.autocast(device_type, dtype=torch.bfloat16):
        yield


def train(
    case: Case, *, num_microbatches: int = 1, context: Context = nullcontext, num_steps: int = NUM_STEPS
) -> Iterator[list[Tensor]]:
    """Train a few steps; yield after each every number that it left: losses, gradients, buffers, random state."""
    optimizer = torch.optim.SGD([at for at in case.model.parameters() if at.requires_grad], lr=0.01)
    for step in range(num_steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        losses = []
        for _ in range(num_microbatches):
            with context():
                loss = case.value()
            loss.backward()
            losses.append(loss.detach())
        yield [*losses, *numbers(case.model)]
        optimizer.step()


def numbers(model: nn.Module) -> list[Tensor]:
    gradients = [at.grad.clone() for at in model.parameters() if at.grad is not None]
    random = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
    return [*gradients, *[buffer.clone() for buffer in model.buffers()], *random]


def assert_equal(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs)
    for at, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(a, b), f"number {at} of {len(mine)} differs"


@dataclass
class InMemory:
    """What `MemoryTier` stores: a copy."""

    tier: "MemoryTier"
    name: str
    tensor: Tensor

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes

    def get(self) -> Tensor:
        self.tier.events.append(("get", self.name))
        return self.tensor.clone()

    def prefetch(self) -> bool:
        self.tier.events.append(("prefetch", self.name))
        return True

    def drain(self) -> None:
        """Nothing is on its way."""

    def free(self) -> None:
        """Nothing to give up."""


class MemoryTier:
    """A tier that notes in which order tensors are put, brought back and fetched ahead; they bear running numbers."""

    name = "memory"

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.num_puts = 0
        self.is_closed = False

    def put(self, flat: Tensor) -> InMemory:
        if self.is_closed:
            raise OffloadError("closed")
        name = str(self.num_puts)
        self.num_puts += 1
        self.events.append(("put", name))
        return InMemory(self, name, flat.clone())

    def flush(self) -> None:
        """All is moved."""

    drain = flush

    def close(self) -> None:
        self.is_closed = True

    def traffic(self) -> Traffic:
        return Traffic(0, 0, 0.0, 0.0, 0, 0)
