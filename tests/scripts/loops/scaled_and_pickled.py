"""Train with autocast, a gradient scaler, clipping and a schedule, and save the whole model by pickle."""

import io

import torch
from torch import nn

torch.manual_seed(0)
model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 256, batch_first=True, dropout=0.1), 6)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler("cpu")
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
for step in range(6):
    inputs = torch.randn(16, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs).float().pow(2).mean()
    optimizer.zero_grad(set_to_none=False)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    print(f"step {step} loss {loss.item()!r}")

saved = io.BytesIO()
torch.save(model, saved)
assert b"packlight" not in saved.getvalue()
saved.seek(0)
again = torch.load(saved, weights_only=False)
again(torch.randn(2, 4, 64)).sum().backward()
