"""Train a byte-level GPT in a loop of its own around Accelerate's objects, with gradients accumulated and clipped."""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1]))
from plain_gpt import GPT, read_bytes

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--print-losses", action="store_true")
parser.add_argument("--packlight", metavar="BUDGET")
parser.add_argument("--exact", action="store_true")
parser.add_argument("--record")
args = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.accumulate)
train, _ = read_bytes()
rows = train[: 65 * 8 * args.steps * args.accumulate].long().view(-1, 65)
model = GPT(width=128, layers=4, heads=4, context=64)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(TensorDataset(rows), batch_size=8)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

context = contextlib.nullcontext()
if args.packlight:
    from packlight.integrations.accelerate import packlight_budget

    context = packlight_budget(accelerator, args.packlight, exact=args.exact, record=args.record)

with context:
    for (batch,) in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if args.print_losses:
            print(f"loss {loss.item()!r}", flush=True)
