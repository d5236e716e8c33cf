"""Claim: a plan for a 7-billion-parameter Llama is made on a laptop, without its memory.

Builds a Llama of 7B shape on the meta device and plans one step of 2,048 tokens with AdamW. Prints the plan, the
seconds and the resident peak of this process, and writes JSON.

    python benchmarks/meta_plan.py --output benchmarks/results/HARDWARE/meta_plan.json
"""

import argparse
import dataclasses
import json
import resource
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import packlight
from packlight.integrations.script import environment

BUDGETS = ("80GiB", "60GiB")


def main() -> None:
    """Plan for each budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        tokens = torch.zeros(1, 2048, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters())
    num_parameters, rows = sum(parameter.numel() for parameter in model.parameters()), []
    for budget in BUDGETS:
        start = time.perf_counter()
        plan = packlight.plan(model, {"input_ids": tokens, "labels": tokens}, optimizer, budget=budget)
        seconds = time.perf_counter() - start
        resident_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"{plan}\n{num_parameters} parameters: {seconds:.1f} s, resident peak {resident_bytes / 2**30:.2f} GiB")
        rows.append(
            {
                "num_parameters": num_parameters,
                "budget": budget,
                "seconds": seconds,
                "resident_peak_bytes": resident_bytes,
                "estimate": dataclasses.asdict(plan.estimate),
                "environment": environment(),
            }
        )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
