"""Train a byte-level GPT by Lightning's Trainer; sharded by FSDP2 where there are several devices."""

import argparse
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1]))
from plain_gpt import GPT, read_bytes

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--print-losses", action="store_true")
parser.add_argument("--packlight", metavar="BUDGET")
parser.add_argument("--exact", action="store_true")
parser.add_argument("--record")
args = parser.parse_args()


class Language(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.gpt = GPT(width=160, layers=5, heads=5, context=64)

    def configure_model(self):
        if args.devices > 1:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for block in self.gpt.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.gpt, mesh=mesh)

    def training_step(self, batch, batch_idx):
        rows = batch[0]
        loss = F.cross_entropy(self.gpt(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        self.log("loss", loss)
        if args.print_losses:
            print(f"rank {self.global_rank} batch {batch_idx} loss {loss.item()!r}", flush=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main():
    torch.manual_seed(0)
    train, _ = read_bytes()
    rows = torch.as_tensor(train[: 65 * 512]).long().view(-1, 65)
    callbacks = []
    if args.packlight:
        from packlight.integrations.lightning import Packlight

        callbacks = [Packlight(args.packlight, exact=args.exact, record=args.record)]
    strategy = "auto"
    if args.devices > 1:
        strategy = ModelParallelStrategy(data_parallel_size=args.devices, tensor_parallel_size=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy=strategy,
        max_steps=args.steps,
        accumulate_grad_batches=args.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    trainer.fit(Language(), DataLoader(TensorDataset(rows), batch_size=8))


if __name__ == "__main__":
    main()
