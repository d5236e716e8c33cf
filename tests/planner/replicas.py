"""Two replicas under DDP, whose batches are of different lengths, unfreeze a body; each writes what it found."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from packlight.optim.adopted_state import CompactState
from packlight.planner.guest import Guest

NUM_STEPS, FROZEN_STEPS, BUDGET = 6, 3, "13MiB"


class Model(nn.Module):
    def __init__(self, width: int = 128, num_blocks: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(256, width), nn.Linear(width, 256)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(num_blocks)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(3)
    model = Model()
    body = [*model.blocks.parameters()]
    head = [each for name, each in model.named_parameters() if not name.startswith("blocks")]
    replica = DistributedDataParallel(model, find_unused_parameters=True)
    model.blocks.requires_grad_(False)
    optimizer, guest = torch.optim.AdamW(head, lr=1e-3), Guest(BUDGET)
    torch.manual_seed(rank)
    with guest.during(optimizer):
        for step in range(NUM_STEPS):
            if step == FROZEN_STEPS:
                model.blocks.requires_grad_(True)
                optimizer.add_param_group({"params": body})
            tokens = torch.randint(256, (4, 101 if rank == 0 and step >= FROZEN_STEPS else 17))
            loss = nn.functional.cross_entropy(replica(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        num_compact = sum(isinstance(state, CompactState) for state in optimizer.state.values())
    assert guest.plan is not None
    own = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    other = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(other, own)
    found = {
        "formats": dict(guest.plan.state_formats),
        "num_compact": num_compact,
        "equal": all(torch.equal(own, each) for each in other),
    }
    (folder / f"{rank}.json").write_text(json.dumps([found]))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[2]))
