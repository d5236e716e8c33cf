"""Train a small Llama under DeepSpeed's ZeRO-2: by transformers' Trainer, or by a loop of its own around the engine."""

import argparse
import contextlib
import sysconfig
from pathlib import Path

import deepspeed
import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

# DeepSpeed would compile a kernel for messages in shared memory, for half a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.logger.setLevel("ERROR")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--by-hand", action="store_true")
parser.add_argument("--out", default="out")
parser.add_argument("--print-losses", action="store_true")
parser.add_argument("--packlight", metavar="BUDGET")
parser.add_argument("--exact", action="store_true")
parser.add_argument("--record")
args = parser.parse_args()

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
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
)
text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py")))
rows = torch.tensor(list(text[: len(text) // 64 * 64])).view(-1, 64)
data = [{"input_ids": row, "labels": row} for row in rows]
config = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 200_000},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def by_trainer():
    callbacks = []
    if args.packlight:
        from packlight.integrations.transformers import PacklightCallback

        callbacks = [PacklightCallback(args.packlight, exact=args.exact, record=args.record)]
    arguments = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        deepspeed=config,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry and args.print_losses and distributed.get_rank() == 0:
            print(f"step {entry['step']} loss {entry['loss']!r}", flush=True)


def by_hand():
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    context = contextlib.nullcontext()
    if args.packlight:
        from packlight.integrations.deepspeed import packlight_budget

        context = packlight_budget(engine, args.packlight, exact=args.exact, record=args.record)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    with context:
        for step in range(args.steps):
            batch = rows[(step * ranks + rank) * 8 :][:8]
            loss = engine(input_ids=batch, labels=batch).loss
            engine.backward(loss)
            engine.step()
            if args.print_losses:
                print(f"rank {rank} step {step} loss {loss.item()!r}", flush=True)


by_hand() if args.by_hand else by_trainer()
distributed.destroy_process_group()
