"""Train with a closure, as optimisers that evaluate the loss themselves want it."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6)])
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
inputs = torch.randn(4096, 64)


def closure():
    optimizer.zero_grad()
    loss = (model(inputs) - inputs).pow(2).mean()
    loss.backward()
    return loss


for step in range(5):
    print(f"step {step} loss {optimizer.step(closure).item()!r}")
