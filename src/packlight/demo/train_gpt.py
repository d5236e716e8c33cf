"""Train a byte-level GPT of about 20 million parameters on the Python standard library's sources.

The text is on every machine that has Python, so nothing is downloaded: the standard library's top-level
modules in sorted order, up to 8 MB, of which every 20th is held out. The model predicts the next byte and is
trained with AdamW, a short warm-up and a linear decay. It is deep and narrow, so that what backward needs
outweighs the model and its optimiser states. Two runs with the same options print the same numbers.

    python train_gpt.py --steps 24 --result result.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BYTE_VALUES = 256
TEXT_LIMIT_BYTES = 8_000_000


@dataclass(frozen=True)
class Shape:
    """The model's sizes, all of them counts."""

    context: int = 256
    width: int = 320
    num_layers: int = 16
    num_heads: int = 5


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.projection = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position (float, batch x length x width) with those before it."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.up_norm = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (float, batch x length x width) with the block's two updates added."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.up_norm(x))))
        return out


class GPT(nn.Module):
    """A byte-level language model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(NUM_BYTE_VALUES, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, NUM_BYTE_VALUES, bias=False)
        # PyTorch's std of 1 would drown the blocks' first updates; GPT-2's 0.02 is slow in so short a run.
        nn.init.normal_(self.token.weight, std=0.3)
        nn.init.normal_(self.position.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            # Less for the layers that add to the residual stream: GPT-2 (Radford et al. 2019, section 2.3).
            for last in (block.attention.projection, block.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * shape.num_layers) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the next bytes' logits (float, batch x length x 256) for tokens (int64, batch x length)."""
        x = self.token(tokens) + self.position(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def read_text() -> tuple[Tensor, Tensor]:
    """Read the training part and the held-out part, each as uint8, one entry a byte."""
    parts = (bytearray(), bytearray())
    for index, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        parts[index % 20 == 0].extend(path.read_bytes())
        if len(parts[0]) >= TEXT_LIMIT_BYTES:
            break
    train, held_out = (torch.frombuffer(part, dtype=torch.uint8) for part in parts)
    return train, held_out


def draw_batch(text: Tensor, generator: torch.Generator, *, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """Cut windows at random places: the inputs and, one byte later, the targets (int64, batch x context)."""
    starts = torch.randint(len(text) - context, (batch,), generator=generator).tolist()
    windows = torch.stack([text[start : start + context + 1] for start in starts]).long()
    return windows[:, :-1], windows[:, 1:]


def next_byte_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats."""
    logits = model(inputs)
    return F.cross_entropy(logits.view(-1, NUM_BYTE_VALUES), targets.reshape(-1))


def make_optimizer(model: GPT) -> torch.optim.AdamW:
    """AdamW in three groups: token embedding and head, of which a step touches few rows, learn faster."""
    faster = {model.token.weight: 2e-2, model.head.weight: 5e-3}
    groups: list[dict[str, Any]] = [{"params": [weight], "lr": rate} for weight, rate in faster.items()]
    blocks = [parameter for parameter in model.parameters() if parameter not in faster]
    return torch.optim.AdamW([*groups, {"params": blocks}], lr=5e-4, betas=(0.9, 0.95))


def make_schedule(optimizer: torch.optim.Optimizer, *, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Three steps of warm-up, then a straight line down to a tenth."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 3) * (1.0 - 0.9 * step / max(1, num_steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def evaluate(model: nn.Module, text: Tensor, *, batch: int, context: int) -> float:
    """Mean next-byte loss, in nats, on 4 batches of held-out text that are the same in every run."""
    generator = torch.Generator().manual_seed(0)
    model.eval()
    with torch.no_grad():
        losses = [
            next_byte_loss(model, *draw_batch(text, generator, batch=batch, context=context)).item() for _ in range(4)
        ]
    return statistics.fmean(losses)


@dataclass
class Result:
    """What `--result` writes; losses in nats a byte, seconds_per_step the median."""

    losses: list[float]
    held_out_loss: float
    seconds_per_step: float
    num_parameters: int


def progress_bar(*, shown: bool) -> Progress:
    """A bar on stderr, so that stdout keeps only the result lines."""
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[news]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def train(options: argparse.Namespace) -> Result:
    """Train for `options.steps` steps, then evaluate on the held-out text."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    text, held_out = read_text()
    sizes = {"batch": options.batch, "context": options.context}
    model = GPT(Shape(context=options.context))
    optimizer = make_optimizer(model)
    schedule = make_schedule(optimizer, num_steps=options.steps)
    losses: list[float] = []
    seconds: list[float] = []

    model.train()
    with progress_bar(shown=options.progress) as progress:
        task = progress.add_task("train", total=options.steps, news="")
        for step in range(options.steps):
            start = time.perf_counter()
            loss = next_byte_loss(model, *draw_batch(text, generator, **sizes))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            progress.update(task, advance=1, news=f"loss {losses[-1]:.3f}  {seconds[-1]:.2f} s/step")
            print(f"step {step} loss {losses[-1]!r}", flush=True)

    return Result(
        losses=losses,
        held_out_loss=evaluate(model, held_out, **sizes),
        seconds_per_step=statistics.median(seconds) if seconds else 0.0,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=24, help="optimiser steps (default: 24)")
    parser.add_argument("--batch", type=int, default=8, help="windows in a batch (default: 8)")
    parser.add_argument("--context", type=int, default=256, help="bytes in a window (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches (default: 0)")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a bar on stderr")
    parser.add_argument("--result", type=Path, metavar="PATH", help="write losses and times here, as JSON")
    return parser.parse_args()


def main() -> None:
    """Train as the command line says, and print or write what came out."""
    options = parse_options()
    result = train(options)
    print(f"held-out loss {result.held_out_loss!r}")
    if options.result is not None:
        options.result.write_text(json.dumps(asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    main()
