"""What the benchmarks of activations share: a step of the demo's GPT on real text, rounds of steps, and live bytes.

A step is a forward, the loss and a backward, without an optimiser: what is measured is not diluted by what is equal.
Contenders are twins of one model, with modules of their own and the same parameters, so that none is luckier in where
its weights lie. A round times everyone once, and the order turns from round to round.
"""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from packlight.activations import find_blocks
from packlight.activations.offload import Tier
from packlight.demo.train_gpt import GPT, Shape, draw_batch, next_byte_loss, read_text
from packlight.planner.tensors import existing_tensors
from packlight.planner.timeline import Timeline

Record = dict[str, Any]
Step = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """A model and its batch.

    Attributes:
        model: a twin of its own for each contender.
        inputs, targets: int64, (batch, context).
        around: makes a context for each forward of the model.
        tier: where its tensors go, if they go anywhere.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    around: Callable[[], AbstractContextManager[Any]] = field(default=contextlib.nullcontext)
    tier: Tier | None = None

    def step(self) -> Tensor:
        """Do a forward and a backward, and return the loss."""
        self.model.zero_grad(set_to_none=True)
        loss = next_byte_loss(self._forward, self.inputs, self.targets)  # type: ignore[arg-type]
        loss.backward()
        return loss.detach()

    def twin(self) -> "Work":
        """Return the same work on modules of its own, with the same parameters."""
        shared = {id(each): each for each in (*self.model.parameters(), *self.model.buffers())}
        return Work(copy.deepcopy(self.model, shared), self.inputs, self.targets)

    def results(self) -> list[Tensor]:
        """Return copies of a step's loss and of every gradient."""
        found = [self.step(), *(each.grad for each in self.model.parameters() if each.grad is not None)]
        copies = [each.clone() for each in found]
        self.model.zero_grad(set_to_none=True)
        return copies

    def _forward(self, inputs: Tensor) -> Tensor:
        with self.around():
            logits: Tensor = self.model(inputs)
        return logits


def gpt(shape: Shape, *, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Work:
    """Make the demo's GPT and one batch of its text.

    Args:
        shape: the model's sizes.
        batch: windows in the batch.
        device: "cpu" or "cuda".
        dtype: of the weights.

    Returns:
        The work.
    """
    torch.manual_seed(0)
    with torch.device(device):  # the initial values of a large model take long on the CPU
        model = GPT(shape).to(dtype)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = draw_batch(read_text()[0], generator, batch=batch, context=shape.context)
    return Work(model, inputs.to(device), targets.to(device))


def checkpoint_blocks(model: nn.Module) -> None:
    """Put torch's own checkpoint around the blocks that packlight.recompute takes.

    Args:
        model: changed in place, for good.
    """
    for block in find_blocks(model):
        module = model.get_submodule(block.module_path)
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def seconds(step: Step, device: str = "cpu") -> float:
    """Time a step; on a GPU until it has done all of it.

    Args:
        step: does one.
        device: "cpu" or "cuda".

    Returns:
        Seconds.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    steps: Mapping[str, Step], *, rounds: int, device: str = "cpu", num_warm_up: int = 2
) -> dict[str, list[float]]:
    """Time steps in rounds.

    Args:
        steps: by contender.
        rounds: how often each is timed.
        device: "cpu" or "cuda".
        num_warm_up: rounds before that are not timed.

    Returns:
        Seconds of each round, by contender.
    """
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-num_warm_up, rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            spent = seconds(steps[name], device)
            if index >= 0:
                samples[name].append(spent)
    return samples


def compared(samples: Mapping[str, Sequence[float]], baseline: str) -> list[Record]:
    """Compare contenders with one of them.

    Args:
        samples: seconds of each round.
        baseline: the name of that one.

    Returns:
        By contender the median, its ratio to the baseline's, and the median and quartiles of the rounds' own ratios.
    """
    rows = []
    for name, spent in samples.items():
        paired = [ours / theirs for ours, theirs in zip(spent, samples[baseline], strict=True)]
        rows.append(
            {
                "contender": name,
                "seconds": statistics.median(spent),
                "least_seconds": min(spent),
                "ratio": statistics.median(spent) / statistics.median(samples[baseline]),
                "paired_ratio": statistics.median(paired),
                "paired_quartiles": statistics.quantiles(paired, n=4)[::2] if len(paired) > 1 else paired * 2,
                "sample_seconds": list(spent),
            }
        )
    return rows


def peak_bytes(step: Step, device: str = "cpu") -> int:
    """Measure the most bytes of tensors that a step has made and that live at one time.

    Args:
        step: does one; gradients of an earlier one should be gone, for they would count as there before.
        device: "cpu", where `Timeline` follows storages, or "cuda", where the allocator counts.

    Returns:
        Bytes, without what was there before.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    line = Timeline(device)
    for tensor in existing_tensors(device):
        line.leave_out(tensor)
    with line:
        step()
    found = line.peak()[0]
    line.close()
    return found


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return |found - exact| / |exact| over all elements of lists of tensors."""
    pairs = list(zip(found, exact, strict=True))
    error = sum(float((ours.double() - theirs.double()).square().sum()) for ours, theirs in pairs)
    return float((error / sum(float(theirs.double().square().sum()) for _, theirs in pairs)) ** 0.5)


def same(found: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Tell whether lists of tensors are equal in every bit that counts."""
    return all(torch.equal(ours, theirs) for ours, theirs in zip(found, exact, strict=True))


def claim(text: str, value: float, limit: float, *, at_least: bool = False) -> Record:
    """Hold a figure against what is claimed of it.

    Args:
        text: what is claimed.
        value: the figure.
        limit: the most, or the least, that it may be.
        at_least: it is the least.

    Returns:
        A record with whether it holds.
    """
    holds = value >= limit if at_least else value <= limit
    return {"claim": text, "value": value, "limit": limit, "relation": ">=" if at_least else "<=", "holds": holds}


def status_bytes(name: str) -> int:
    """Return a figure of /proc/self/status in bytes: VmRSS is resident now, VmHWM was at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
