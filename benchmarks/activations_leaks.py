"""Nothing is left behind: neither by steps that succeed, nor by those that fail, nor by engines taken off.

A tiny model is trained with every choice at once, in cycles. A cycle puts an engine on with the next codec, does steps
that succeed, fail in forward, in backward or in a recomputed block, have no backward, two of them or no gradients, and
takes the engine off. One round has a cycle for each codec; the first is for warm-up. Counted are hooks, threads, open
files, tensors, stored bytes, and every object that Python's garbage collector knows:

    half way through a cycle and at its end     must be equal: an engine that stays on does not grow
    after the engine was taken off              must equal what it was in the same cycle of the round before

    python -m benchmarks.activations leaks
"""

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from benchmarks.activations_steps import Record, claim, status_bytes
from packlight.activations import Engine, make_tier
from packlight.activations.compress import CODECS
from packlight.activations.offload import Tier
from packlight.activations.saver import top_hooks
from packlight.planner.tensors import existing_tensors

WIDTH, BATCH, NUM_LAYERS = 32, 32, 5
MIN_BYTES = 2**10
CHOICES = {
    "*": "keep",
    "0": "recompute",
    "1": "offload",
    "2": "compress",
    "3": "compress+offload",
    "4": "recompute",
    "4.up": "keep",
    "4.down": "offload",
}
_NAMES = (
    "objects",
    "hooks",
    "threads",
    "kernel threads",
    "open files",
    "files",
    "tensor bytes",
    "stored bytes",
)
RESIDENT = "resident bytes"
IDLE_SECONDS = 0.05  # a thread of the tier holds its job for a moment longer than its result takes to come
#: What happens in a step. Their number and that of the layers have no common divisor, so all pairs come about.
KINDS = ("plain", "forward", "plain", "backward", "second run", "no backward", "twice", "no gradients", "plain")


class Interrupt(Exception):
    """What steps are made to fail with."""


class Layer(nn.Module):
    """A perceptron with a norm, a ReLU and a dropout, which fails where it is told to.

    Attributes:
        fails_in: "forward", "backward" or "" for nowhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.fails_in = ""

    def forward(self, x: Tensor) -> Tensor:
        """Map fp32, (batch, width), to the same shape."""
        hidden = self.dropout(F.relu(self.up(self.norm(x))))
        if self.fails_in == "forward":
            raise Interrupt
        if self.fails_in == "backward":
            hidden = _FailingBackward.apply(hidden)  # type: ignore[no-untyped-call]
        out: Tensor = x + self.down(hidden)
        return out


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise Interrupt


class Loop:
    """The model, what was counted, and how often a step failed.

    Args:
        folder: of the disk tier's file.
        codecs: of the cycles of a round.
        num_steps: of a cycle.
    """

    def __init__(self, folder: Path, *, codecs: Sequence[str], num_steps: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.folder, self.codecs, self.num_steps = folder, codecs, num_steps
        self.counts: dict[str, list[int]] = {}  # by what and when, of each cycle; ints, which add no objects
        self.num_failed: dict[str, int] = dict.fromkeys(KINDS, 0)
        # After the first and the last cycle; made like this, because the first Counter of a generator makes caches.
        self.types = [Counter(name for name in "") for _ in range(2)]

    def run(self, num_rounds: int) -> None:
        """Do rounds of a cycle for each codec."""
        for number in range(num_rounds):
            for index, codec in enumerate(self.codecs):
                self._cycle(codec, first=index * self.num_steps)
            self.types[number > 1] = Counter(type(each).__qualname__ for each in gc.get_objects())

    def changes(self) -> list[str]:
        """Say which counts differ that should not; the first round is left out."""
        period = len(self.codecs)
        return [
            f"{name}, {now}, cycle {index}: {value} and not {self.counts[f'{name}, {before}'][index - back]}"
            for name in _NAMES
            for now, before, back in (("at the end", "half way", 0), ("without", "without", period))
            for index, value in enumerate(self.counts[f"{name}, {now}"])
            if index >= period + back and value != self.counts[f"{name}, {before}"][index - back]
        ]

    def _cycle(self, codec: str, *, first: int) -> None:
        tier = make_tier("disk", device=torch.device("cpu"), folder=self.folder, max_in_flight_bytes=2**16)
        engine = Engine(self.model, CHOICES, codec=codec, tier=tier, min_bytes=MIN_BYTES)
        half = first + self.num_steps // 2
        for when, begin, end in (("half way", first, half), ("at the end", half, first + self.num_steps)):
            for index in range(begin, end):
                self._try(index)
            tier.flush()
            self._count(when, tier)
        engine.remove()
        del engine, tier
        self._count("without", None)

    def _try(self, index: int) -> None:
        torch.manual_seed(index)
        kind = KINDS[index % len(KINDS)]
        try:
            self._step(kind, self.model[index % NUM_LAYERS])
        except Interrupt:
            self.num_failed[kind] += 1
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, kind: str, layer: nn.Module) -> None:
        assert isinstance(layer, Layer)
        layer.fails_in = kind if kind in ("forward", "backward") else ""
        try:
            with torch.set_grad_enabled(kind != "no gradients"):
                loss = self.model(torch.randn(BATCH, WIDTH)).square().mean()
            layer.fails_in = "forward" if kind == "second run" else layer.fails_in
            if loss.requires_grad and kind != "no backward":
                if kind == "twice":
                    loss.backward(retain_graph=True)
                loss.backward()
                self.optimizer.step()
        finally:
            layer.fails_in = ""

    def _count(self, when: str, tier: Tier | None) -> None:
        time.sleep(IDLE_SECONDS)
        tensor_bytes = _tensor_bytes()  # first: what stands for a storage in Python is made when it is asked for
        for _ in range(3):  # the collector stops following a tuple or a dict only once it has looked into it
            gc.collect()
        found = (
            len(gc.get_objects()),
            _num_hooks(self.model),
            threading.active_count(),
            len(os.listdir("/proc/self/task")),
            len(os.listdir("/proc/self/fd")),
            len(os.listdir(self.folder)),
            tensor_bytes,
            tier.traffic().stored_bytes if tier else 0,
            status_bytes("VmRSS"),
        )
        for name, value in zip((*_NAMES, RESIDENT), found, strict=True):
            self.counts.setdefault(f"{name}, {when}", []).append(value)


def leaks(folder: Path, *, num_steps: int = 100, num_rounds: int = 4, codecs: Sequence[str] = CODECS) -> Record:
    """Run the loop, and compare.

    Args:
        folder: an empty one for the disk tier.
        num_steps: of a cycle, of which a round has one for each codec; from 90 on every site is seen half way.
        num_rounds: of which the first is warm-up.
        codecs: of the cycles.

    Returns:
        The record.

    Raises:
        AssertionError: a kind of failure never happened, so that nothing was tried.
    """
    gc.collect()
    gc.freeze()  # what was there before is not looked at each time
    try:
        loop = Loop(folder, codecs=codecs, num_steps=num_steps)
        loop.run(num_rounds)
    finally:
        gc.unfreeze()
    assert all(loop.num_failed[kind] for kind in ("forward", "backward", "second run")), loop.num_failed
    changes, period = loop.changes(), len(codecs)
    resident = loop.counts[f"{RESIDENT}, without"]
    return {
        "num_steps": num_steps * num_rounds * period,
        "num_engines": num_rounds * period,
        "num_failed": {kind: num for kind, num in loop.num_failed.items() if num},
        "counts": loop.counts,
        "changes": changes,
        "more_objects_by_type": dict(loop.types[1] - loop.types[0]),
        "predicted_changes": 0,
        "resident_growth_bytes": resident[-1] - resident[period - 1],
        "rows": [
            {"what": name, "after_warm_up": values[period - 1], "at_the_end": values[-1]}
            for name, values in loop.counts.items()
        ],
        "claims": [claim("counts that changed", len(changes), 0)],
    }


def _num_hooks(model: nn.Module) -> int:
    """Count hooks and replaced forwards of a model, hooks of all modules, and saved-tensor hooks."""
    own = sum(
        len(value) if name.endswith("_hooks") and isinstance(value, dict) else name == "forward"
        for module in model.modules()
        for name, value in vars(module).items()
    )
    shared = (value for name, value in vars(torch_module).items() if name.startswith("_global_"))
    return own + sum(len(value) for value in shared if isinstance(value, dict)) + (top_hooks() is not None)


def _tensor_bytes() -> int:
    held = (tensor.untyped_storage() for tensor in existing_tensors("cpu"))
    return sum({storage._cdata: storage.nbytes() for storage in held}.values())
