"""Trains three steps, then leaves with an exit status of its own."""

import sys

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(3):
    loss = model(torch.randn(64, 32)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step} loss {loss.item()!r}", flush=True)

sys.exit(7)
