"""Train the byte-level GPT of plain_gpt.py on several processes, its states cut by fully_shard."""

import argparse

import torch
from plain_gpt import GPT, draw, read_bytes
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    model = GPT(width=160, layers=5, heads=5, context=64)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train, _ = read_bytes()
    generator = torch.Generator().manual_seed(rank)
    for step in range(args.steps):
        inputs, targets = draw(train, 8, 64, generator)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank} step {step} loss {loss.item()!r}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
