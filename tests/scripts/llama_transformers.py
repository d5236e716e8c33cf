"""Train a small Llama from transformers on the bytes of the Python standard library's sources."""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--context", type=int, default=128)
args = parser.parse_args()

torch.manual_seed(args.seed)

sources = sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
sources += sorted(Path(sysconfig.get_path("stdlib"), "email").glob("*.py"))
text = b"".join(path.read_bytes() for path in sources)
data = torch.tensor(list(text), dtype=torch.long)
rows = data[: len(data) // args.context * args.context].view(-1, args.context)
rows = rows[torch.randperm(len(rows))]
held_out, train = rows[: args.batch], rows[args.batch :]

config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=args.context,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

model.train()
for step in range(args.steps):
    input_ids = train[torch.randint(len(train), (args.batch,))]
    out = model(input_ids=input_ids, labels=input_ids)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {out.loss.item()!r}", flush=True)

model.eval()
with torch.no_grad():
    out = model(input_ids=held_out, labels=held_out)
print(f"held-out loss {out.loss.item()!r}")
