"""Train the byte-level GPT of plain_gpt.py on several processes under DeepSpeed's ZeRO."""

import argparse

import deepspeed
import torch
from plain_gpt import GPT, draw, read_bytes
from torch import distributed
from torch.nn import functional as F

# DeepSpeed would compile a kernel for messages in shared memory, for half a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.logger.setLevel("ERROR")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--stage", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(width=160, layers=5, heads=5, context=64)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": no_decay, "weight_decay": 0.0}], lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": args.stage, "reduce_bucket_size": 200_000},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    rank = distributed.get_rank()
    train, _ = read_bytes()
    generator = torch.Generator().manual_seed(rank)
    for step in range(args.steps):
        inputs, targets = draw(train, 8, 64, generator)
        loss = F.cross_entropy(engine(inputs).flatten(0, 1), targets.flatten())
        engine.backward(loss)
        engine.step()
        print(f"rank {rank} step {step} loss {loss.item()!r}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
