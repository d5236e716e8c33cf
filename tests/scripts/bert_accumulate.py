"""Train a BERT-like encoder to restore masked bytes: autocast, dropout, clipping, schedule, accumulation."""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

MASK = 256


class Encoder(nn.Module):
    def __init__(self, width=128, layers=6, heads=4, context=128):
        super().__init__()
        self.token = nn.Embedding(257, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.dropout = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens):
        x = self.dropout(self.token(tokens) + self.position[: tokens.size(1)])
        return self.head(self.encoder(x))


def mask_bytes(tokens, generator):
    hidden = torch.rand(tokens.shape, generator=generator) < 0.15
    return tokens.masked_fill(hidden, MASK), tokens.masked_fill(~hidden, -100)


def warm_up_then_cosine(step, *, total, warm_up=2):
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed + 1)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    rows = text[: len(text) // args.context * args.context].view(-1, args.context).long()
    train, held_out = rows[: -args.batch], rows[-args.batch :]

    model = Encoder(context=args.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_cosine(step, total=args.steps))

    def masked_loss(tokens):
        inputs, targets = mask_bytes(tokens, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    model.train()
    for step in range(args.steps):
        total = 0.0
        for _ in range(args.accumulate):
            picks = torch.randint(len(train), (args.batch,), generator=generator)
            loss = masked_loss(train[picks]) / args.accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step} loss {total!r}", flush=True)

    model.eval()
    with torch.no_grad():
        print(f"held-out loss {masked_loss(held_out).item()!r}")


if __name__ == "__main__":
    main()
