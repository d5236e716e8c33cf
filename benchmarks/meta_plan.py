"""Claim: plans for Llamas of 7, 13 and 70 billion parameters are made on a laptop, for GPUs that are not at hand.

Builds each Llama on the meta device, with bf16 parameters, and plans one step of one or four sequences of 4,096 tokens
with AdamW for named hardware. Each plan is made in a process of its own; its seconds (from the finished model to the
finished plan) and that process's resident peak are printed and written as JSON. The goal for 70 billion: under 60 s and
4 GiB.

No single device holds 70 billion parameters with gradients and states. Their plans are for a device with the rates of
the named one and as much memory as the budget says, which a `Budget` in bytes asks for; a note in the plan says so.
These budgets lie between the smallest that fits and the peak of the training as it is, which a plan before, in the same
process, has told. With one sequence the gradients outweigh the activations, so that low-bit states are all that helps;
with four, activations have to go too.

    python benchmarks/meta_plan.py --output benchmarks/results/HARDWARE/meta_plan.json
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import packlight
from packlight.integrations.script import environment

SEQUENCE_LENGTH = 4096

# Touvron et al., "LLaMA" (arXiv 2302.13971), table 2; "Llama 2" (arXiv 2307.09288) for 70B with 8 groups of keys.
SHAPES = {
    "7B": LlamaConfig(),
    "13B": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}

PLANS = (
    ("7B", "1", "h100-80g", "95%", ""),
    ("7B", "1", "l40s", "95%", ""),
    ("13B", "1", "h200", "95%", ""),
    ("13B", "1", "h100-80g", "95%", ""),
    ("70B", "1", "h200", "between", ""),
    ("70B", "1", "h200", "smallest", ""),
    ("70B", "4", "h200", "tight", ""),
    ("70B", "4", "h200", "tight", "1TiB"),
)
"""Shape, sequences, hardware, budget (a share of the device, or one of `SHARES` of the way up from the smallest), and
what host memory may take."""

SHARES = {"smallest": 0.0, "tight": 0.1, "between": 0.5}
"""How far from the smallest budget that fits to the peak of the training as it is."""


def main() -> None:
    """Make every plan in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--only", help="make the plans of this shape alone")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(make_plan(*options.one)))
        return
    rows = [in_own_process(each) for each in PLANS if options.only in (None, each[0])]
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def in_own_process(each: tuple[str, ...]) -> dict[str, Any]:
    """Make one plan in a process of its own, and print what it took."""
    done = subprocess.run([sys.executable, __file__, "--one", *each], check=True, stdout=subprocess.PIPE)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{row['text']}\n{row['shape']}, {row['num_parameters']} parameters, {row['num_tokens']} tokens: "
        f"{row['seconds']:.1f} s, resident peak {row['resident_peak_bytes'] / 2**30:.2f} GiB\n",
        flush=True,
    )
    return row


def make_plan(shape: str, num_sequences: str, hardware: str, budget: str, host_budget: str) -> dict[str, Any]:
    """Make one plan; return it with what it took."""
    with torch.device("meta"):
        model = LlamaForCausalLM(SHAPES[shape]).to(torch.bfloat16)
        tokens = torch.zeros(int(num_sequences), SEQUENCE_LENGTH, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = {"input_ids": tokens, "labels": tokens}
    allowed = budget if budget.endswith("%") else tight_budget(model, batch, optimizer, hardware, budget)
    start = time.perf_counter()
    plan = packlight.plan(model, batch, optimizer, budget=allowed, hardware=hardware, host_budget=host_budget or None)
    seconds = time.perf_counter() - start
    return {
        "shape": shape,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_tokens": tokens.numel(),
        "hardware": hardware,
        "host_budget": host_budget,
        "budget_bytes": plan.budget_bytes,
        "smallest_budget_bytes": plan.smallest_budget_bytes,
        "seconds": seconds,
        "resident_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "num_choices": Counter(f"{choice.choice} {choice.codec}".strip() for choice in plan.choices),
        "num_state_formats": Counter(plan.state_formats.values()),
        "estimate": dataclasses.asdict(plan.estimate),
        "notes": plan.notes,
        "text": str(plan),
        "environment": environment(),
    }


def tight_budget(
    model: torch.nn.Module, batch: Any, optimizer: torch.optim.Optimizer, hardware: str, budget: str
) -> packlight.Budget:
    """Return the budget that stands so far above the smallest one."""
    ample = packlight.plan(model, batch, optimizer, budget=packlight.Budget(2**50), hardware=hardware)
    smallest_bytes, plain_bytes = ample.smallest_budget_bytes, ample.estimate.plain_peak_bytes
    return packlight.Budget(smallest_bytes + int(SHARES[budget] * (plain_bytes - smallest_bytes)))


if __name__ == "__main__":
    main()
