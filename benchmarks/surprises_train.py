"""Trains a small language model on the standard library's sources, with one of the surprises that training has.

Not edited for packlight: `benchmarks/surprises.py` runs it by `packlight run`. Prints each step's loss in full.
"""

import argparse
import sysconfig
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


class Model(nn.Module):
    """A byte-level language model."""

    def __init__(self, crowded: nn.Module, width: int = 192, num_layers: int = 8) -> None:
        super().__init__()
        self.embed, self.head, self.crowded = nn.Embedding(256, width), nn.Linear(width, 256), crowded
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, batch_first=True) for _ in range(num_layers)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of shape (N, T) to logits of shape (N, T, 256)."""
        x = self.embed(tokens)
        for at, layer in enumerate(self.layers):
            x = self.crowded(layer(x)) if at == 3 else layer(x)
        logits: Tensor = self.head(x)
        return logits


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--doubled-from", type=int, default=-1, help="the step from which sequences are twice as long")
    parser.add_argument("--out-of-memory", choices=["", "forward", "backward"], default="")
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("a*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = Model(Crowded(options.out_of_memory, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        length = 128 * (2 if 0 <= options.doubled_from <= step else 1)
        starts = torch.randint(len(data) - length - 1, (8,))
        windows = torch.stack([data[start : start + length + 1] for start in starts])
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item()!r}", flush=True)


if __name__ == "__main__":
    main()
