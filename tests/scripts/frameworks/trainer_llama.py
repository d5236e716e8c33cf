"""Train a small Llama by transformers' Trainer on the bytes of the Python standard library's sources."""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--accumulate", type=int, default=2)
parser.add_argument("--out", default="out")
parser.add_argument("--save-steps", type=int, default=0)
parser.add_argument("--resume", metavar="CHECKPOINT")
parser.add_argument("--print-losses", action="store_true")
parser.add_argument("--packlight", metavar="BUDGET")
parser.add_argument("--exact", action="store_true")
parser.add_argument("--record")
args = parser.parse_args()

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config)

text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py")))
rows = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)
data = [{"input_ids": row, "labels": row} for row in rows]

callbacks = []
if args.packlight:
    from packlight.integrations.transformers import PacklightCallback

    callbacks = [PacklightCallback(args.packlight, exact=args.exact, record=args.record)]

trainer = Trainer(
    model,
    TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=args.accumulate,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=data[16:],
    eval_dataset=data[:16],
    callbacks=callbacks,
)
trainer.train(resume_from_checkpoint=args.resume)
metrics = trainer.evaluate()
if args.print_losses:
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']} loss {entry['loss']!r}")
    print(f"held-out loss {metrics['eval_loss']!r}")
