"""Train an MLP-Mixer text classifier that evaluates as it goes, saves a checkpoint and resumes from one.

It tells from 96 bytes of a standard library source which of 16 modules they come from.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

LENGTH = 96
NUM_MODULES = 16


class Mixer(nn.Module):
    """An MLP-Mixer block: one perceptron along the text, one along the channels."""

    def __init__(self, width):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.along = nn.Sequential(nn.Linear(LENGTH, LENGTH), nn.GELU(), nn.Linear(LENGTH, LENGTH))
        self.norm_2 = nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.along(self.norm_1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.across(self.norm_2(x))


class Classifier(nn.Module):
    def __init__(self, width=96, num_blocks=6):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList([Mixer(width) for _ in range(num_blocks)])
        self.head = nn.Linear(width, NUM_MODULES)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def read_examples():
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: -path.stat().st_size)
    tokens, labels = [], []
    for label, path in enumerate(paths[:NUM_MODULES]):
        data = torch.frombuffer(bytearray(path.read_bytes()[: 400 * LENGTH]), dtype=torch.uint8)
        rows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH).long()
        tokens.append(rows)
        labels.append(torch.full((len(rows),), label))
    order = torch.randperm(sum(map(len, labels)), generator=torch.Generator().manual_seed(0))
    return torch.cat(tokens)[order], torch.cat(labels)[order]


@torch.no_grad()
def evaluate(model, tokens, labels):
    model.eval()
    loss = F.cross_entropy(model(tokens), labels).item()
    model.train()
    return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="the step to stop at, also when resuming")
    parser.add_argument("--every", type=int, default=3, help="evaluate after so many steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", type=Path)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokens, labels = read_examples()
    held_out = tokens[: args.batch], labels[: args.batch]
    tokens, labels = tokens[args.batch :], labels[args.batch :]

    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    first = 0
    if args.resume:
        checkpoint = torch.load(args.resume, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["step"]

    model.train()
    for step in range(first, args.steps):
        # A batch depends on the seed and the step alone, so that a resumed run sees what a longer one would.
        generator = torch.Generator().manual_seed(1000 * args.seed + step)
        picks = torch.randint(len(tokens), (args.batch,), generator=generator)
        loss = F.cross_entropy(model(tokens[picks]), labels[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item()!r}", flush=True)
        if (step + 1) % args.every == 0:
            print(f"after step {step} held-out loss so far {evaluate(model, *held_out)!r}", flush=True)

    print(f"held-out loss {evaluate(model, *held_out)!r}")
    if args.out:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": args.steps}
        torch.save(state, args.out)


if __name__ == "__main__":
    main()
