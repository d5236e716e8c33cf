"""Train a small network in which memory runs out at one call of a layer, in forward or in backward."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--where", choices=["forward", "backward"], default="forward")
parser.add_argument("--call", type=int, default=0)
args = parser.parse_args()
calls = {"forward": 0, "backward": 0}


def count(where):
    calls[where] += 1
    if where == args.where and calls[where] == args.call:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        count("backward")
        return gradient


class Crowded(nn.Module):
    def forward(self, x):
        if type(x) is torch.Tensor:
            count("forward")
            return Pass.apply(x)
        return x


def block():
    return nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64))


torch.manual_seed(0)
model = nn.Sequential(*[block() for _ in range(3)], Crowded(), *[block() for _ in range(3)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(4):
    x = torch.randn(512, 64)
    for part in x.chunk(2):
        loss = (model(part) - part).square().mean() / 2
        loss.backward()
        print(f"step {step} loss {loss.item()!r}", flush=True)
    optimizer.step()
    optimizer.zero_grad()
print(sum(value.double().sum() for value in model.state_dict().values()).item())
