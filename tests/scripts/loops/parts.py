"""Train a model whose parts are called one by one, never the whole."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 2, 256, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 6)
        self.mixers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2)])
        self.head = nn.Linear(64, 10)


model = Model()
optimizer = torch.optim.AdamW(model.parameters())
for step in range(5):
    inputs, targets = torch.randn(64, 64, 64), torch.randint(0, 10, (64,))
    optimizer.zero_grad()
    hidden = model.encoder(inputs)
    for mixer in model.mixers:
        hidden = hidden + mixer(hidden)
    loss = F.cross_entropy(model.head(hidden.mean(1)), targets)
    loss.backward()
    optimizer.step()
    print(f"step {step} loss {loss.item()!r}")
