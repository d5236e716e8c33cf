"""Says how it was started, as one line of JSON, and trains two steps."""

import json
import sys

import torch
from torch import nn

print(json.dumps({"argv": sys.argv, "name": __name__, "file": __file__}), flush=True)

torch.manual_seed(0)
model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(2):
    loss = model(torch.randn(64, 32)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step} loss {loss.item()!r}", flush=True)
