"""Train a deep, flat nn.Sequential of primitive layers to tell smooth functions from their sampled values."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--batch", type=int, default=5120)
parser.add_argument("--width", type=int, default=192)
parser.add_argument("--depth", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)


def draw(batch):
    points = torch.rand(batch, 8) * 2 - 1
    values = torch.sin(3 * points).sum(1, keepdim=True) + points.prod(1, keepdim=True)
    return points, values


layers = [nn.Linear(8, args.width)]
for _ in range(args.depth):
    layers += [nn.LayerNorm(args.width), nn.ReLU(), nn.Linear(args.width, args.width)]
layers += [nn.ReLU(), nn.Linear(args.width, 1)]
model = nn.Sequential(*layers)

criterion = nn.MSELoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(args.steps):
    points, values = draw(args.batch)
    optimizer.zero_grad()
    loss = criterion(model(points), values)
    loss.backward()
    optimizer.step()
    print(f"step {step} loss {loss.item()!r}", flush=True)

model.eval()
with torch.no_grad():
    points, values = draw(args.batch)
    print(f"held-out loss {criterion(model(points), values).item()!r}")
