"""Claim: plans for ranks count what ZeRO's paper counts, and what DeepSpeed holds beside it, of a model of 7.5 billion.

For 1, 4, 16 and 64 ranks and each stage: the paper's formula (arXiv 1910.02054, figure 1: 120, 31.4, 16.6 and 1.88 GB
on 64 ranks), DeepSpeed's own estimator, and the parameters, gradients and states of `packlight plan --world`, with fp32
and with 4-bit states. The model is a decoder of 36 layers and width 4096 on the meta device, in bf16, with a tied head;
nothing of it is allocated. DeepSpeed's estimator gets the number of parameters; what it makes of the model on the meta
device stands beside it. That the figures of `plan` are what DeepSpeed holds is tests/sharding/test_held.py's.

    python benchmarks/zero_table.py --output benchmarks/results/simulated/zero_table.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs, model_to_params
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import packlight
from packlight.planner.request import World
from packlight.sharding.stages import paper_bytes

WORLDS = (1, 4, 16, 64)
FORMATS = ("fp32", "4bit")


class Block(nn.Module):
    """A decoder's layer with fused projections."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.num_heads = num_heads

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states (batch, length, width) after attention and the two linear layers."""
        shape = (*hidden.shape[:2], self.num_heads, -1)
        parts = self.qkv(self.norm_1(hidden)).chunk(3, -1)
        query, key, value = (each.reshape(shape).transpose(1, 2) for each in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(hidden.shape))
        return hidden + self.down(functional.gelu(self.up(self.norm_2(hidden))))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """A language model with a tied head."""

    def __init__(self, *, width: int = 4096, num_layers: int = 36, length: int = 1024, vocabulary: int = 50257) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 32) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of tokens (batch, length)."""
        hidden = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def rows_of(model: nn.Module, *, num_ranks: int) -> list[dict[str, Any]]:
    """Return a row for each stage and format; bytes."""
    numel = sum(each.numel() for each in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(1, 1024, dtype=torch.long, device="meta")
    world = World(num_ranks, engine="zero")
    budget = packlight.Budget.of("1TiB")  # nothing has to be changed: the table is of what would be held
    plan = packlight.plan(model, ids, optimizer, budget=budget, hardware="h100-80g", world=world)
    assert plan.sharding is not None
    ways = {int(row.name[-1]): row for row in plan.sharding.rows}
    whole = ways[0].state_bytes
    found = []
    for stage in range(4):
        for state_format in FORMATS:
            row, each = ways[stage], 4 + whole[state_format] / numel
            states = row.state_bytes[state_format]
            found.append(
                {
                    "ranks": num_ranks,
                    "stage": stage,
                    "states": state_format,
                    "paper": paper_bytes(numel, stage=stage, num_ranks=num_ranks, state_bytes=each),
                    "deepspeed": estimated(numel, stage=stage, num_ranks=num_ranks) if state_format == "fp32" else None,
                    "parameters": row.parameter_bytes,
                    "gradients": row.gradient_bytes,
                    "optimizer_states": states,
                    "packlight": row.parameter_bytes + row.gradient_bytes + states,
                    "buffers": row.buffer_bytes,
                }
            )
    return found


def estimated(numel: int, *, stage: int, num_ranks: int) -> int | None:
    """Return what DeepSpeed's estimators say, which know stages 2 and 3 only."""
    options: dict[str, Any] = {"num_gpus_per_node": min(8, num_ranks), "num_nodes": max(1, num_ranks // 8)}
    if stage == 2:
        return int(estimate_zero2_model_states_mem_needs(numel, cpu_offload=False, **options)[1])
    if stage == 3:
        largest = 50257 * 4096
        options |= {"cpu_offload": False, "cpu_offload_params": False}
        return int(estimate_zero3_model_states_mem_needs(numel, largest, **options)[1])
    return None


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", type=int, default=36)
    arguments = parser.parse_args()
    with torch.device("meta"):
        model = Decoder(num_layers=arguments.layers).bfloat16()
    numel = sum(each.numel() for each in model.parameters())
    rows = [row for num_ranks in WORLDS for row in rows_of(model, num_ranks=num_ranks)]
    versions = {"torch": torch.__version__, "packlight": packlight.__version__}
    found = {"parameters": numel, "deepspeed_counts": int(model_to_params(model)), "rows": rows, "versions": versions}
    table = Table(
        title=f"GB on a rank; {numel} parameters, {found['deepspeed_counts']} as DeepSpeed counts them on meta"
    )
    for name in ("ranks", "stage", "states", "paper", "deepspeed", "packlight", "buffers"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = [row[name] for name in ("paper", "deepspeed", "packlight", "buffers")]
        told = ["-" if size is None else f"{size / 1e9:.2f}" for size in sizes]
        table.add_row(str(row["ranks"]), str(row["stage"]), row["states"], *told)
    Console().print(table)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
