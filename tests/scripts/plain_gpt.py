"""Train a small byte-level GPT, written out in plain PyTorch, on the Python standard library's sources."""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, width, layers, heads, context):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens):
        x = self.token(tokens) + self.position(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def read_bytes():
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    text = b"".join(path.read_bytes() for path in sources)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    split = int(0.9 * len(data))
    return data[:split], data[split:]


def draw(data, batch, context, generator):
    starts = torch.randint(len(data) - context - 1, (batch,), generator=generator).tolist()
    window = torch.stack([data[start : start + context + 1] for start in starts]).long()
    return window[:, :-1], window[:, 1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train, held_out = read_bytes()
    model = GPT(width=160, layers=8, heads=5, context=args.context)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    )

    model.train()
    for step in range(args.steps):
        inputs, targets = draw(train, args.batch, args.context, generator)
        logits = model(inputs)
        loss = F.cross_entropy(logits.view(-1, 256), targets.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item()!r}", flush=True)

    model.eval()
    with torch.no_grad():
        inputs, targets = draw(held_out, args.batch, args.context, generator)
        logits = model(inputs)
        loss = F.cross_entropy(logits.view(-1, 256), targets.reshape(-1))
    print(f"held-out loss {loss.item()!r}")


if __name__ == "__main__":
    main()
