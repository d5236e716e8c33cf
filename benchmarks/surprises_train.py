"""Trains a small language model on the standard library's sources, with one of the surprises that training has.

`benchmarks/surprises.py` runs it by `packlight run`, of which it knows only that tensors of a trace have no memory that
could run out. Prints each step's loss in full.
"""

import argparse
import os
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Crowded(nn.Module):
    """Lets memory run out at one call, in forward or in backward, as the allocator would."""

    def __init__(self, where: str, call: int) -> None:
        super().__init__()
        self.where, self.call = where, call

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        # On fake tensors there is no allocator.
        return _Pass.apply(x, self) if type(x) is Tensor else x  # type: ignore[no-any-return, no-untyped-call]


_calls = {"forward": 0, "backward": 0}


def _count(where: str, layer: Crowded) -> None:
    _calls[where] += 1
    if where == layer.where and _calls[where] == layer.call:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Crowded) -> Tensor:
        ctx.layer = layer
        _count("forward", layer)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        _count("backward", ctx.layer)
        return gradients[0], None


def slow_the_disk(bytes_per_second: float) -> None:
    """Let every positioned read and write of this process take its time, one after another, as a busy volume does."""
    turn = threading.Lock()

    def slow(call: Callable[..., int]) -> Callable[..., int]:
        def slowly(*args: Any) -> int:
            with turn:
                num_bytes = call(*args)
                time.sleep(num_bytes / bytes_per_second)
            return num_bytes

        return slowly

    os.pwrite, os.preadv = slow(os.pwrite), slow(os.preadv)


class Model(nn.Module):
    """A byte-level language model."""

    def __init__(self, crowded: nn.Module, *, width: int, num_layers: int) -> None:
        super().__init__()
        self.embed, self.head, self.crowded = nn.Embedding(256, width), nn.Linear(width, 256), crowded
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, batch_first=True) for _ in range(num_layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of shape (N, T) to logits of shape (N, T, 256)."""
        x = self.embed(tokens)
        for at, layer in enumerate(self.layers):
            x = self.crowded(layer(x)) if at == len(self.layers) // 2 else layer(x)
        logits: Tensor = self.head(x)
        return logits


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--doubled-from", type=int, default=-1, help="the step from which sequences are twice as long")
    parser.add_argument("--out-of-memory", choices=["", "forward", "backward"], default="")
    parser.add_argument("--slow-disk-from", type=int, default=-1, help="the step from which the disk is slow")
    parser.add_argument("--disk-bytes-per-second", type=float, default=20e6, help="how slow it is")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("a*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = Model(Crowded(options.out_of_memory, 1), width=options.width, num_layers=options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        if step == options.slow_disk_from:
            slow_the_disk(options.disk_bytes_per_second)
        length = 128 * (2 if 0 <= options.doubled_from <= step else 1)
        starts = torch.randint(len(data) - length - 1, (options.batch,))
        windows = torch.stack([data[start : start + length + 1] for start in starts])
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item()!r}", flush=True)


if __name__ == "__main__":
    main()
