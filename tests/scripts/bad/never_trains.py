"""Only looks at what a model says; there is no step in it."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)])
model.eval()

with torch.no_grad():
    loss = model(torch.randn(64, 32)).square().mean()
print(f"held-out loss {loss.item()!r}")
