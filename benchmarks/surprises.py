"""Claim: what goes otherwise than planned is handled within the budget, bit for bit, and said.

Each surprise meets a script of its own process under `packlight run --exact`: sequences twice as long from step 4 on,
memory that runs out in step 1, in forward and in backward, and a disk that is slow from the start, or from step 4 on.
Losses are compared with those of the plain script as text. Last, a host budget that binds: plans for a model on a GPU
that is not here.

    python -m benchmarks.surprises --output benchmarks/results/HARDWARE/surprises.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import packlight

ROOT = Path(__file__).parents[1]
WIDE = ["--layers", "4", "--width", "144", "--batch", "32"]
"""A model whose activations outweigh its states, so that the disk is needed."""
SURPRISES = {
    "sequences twice as long": ([], ["--doubled-from", "4"], 120),
    "out of memory in forward of step 1": ([], ["--out-of-memory", "forward"], 80),
    "out of memory in backward of step 1": ([], ["--out-of-memory", "backward"], 80),
    "a disk as it is": (WIDE, [], 45),
    "a disk that is slow from the start": (WIDE, ["--slow-disk-from", "0"], 45),
    "a disk that is slow from step 4 on": (WIDE, ["--slow-disk-from", "4"], 45),
}
"""The script's arguments, those that surprise, and the budget in percent of the plain peak of its first steps."""
RATES = ("out_bytes_per_second", "in_bytes_per_second")
"""Of the tier: what the plan took them to be, and what they were."""


def run(options: Sequence[str], arguments: Sequence[str]) -> tuple[dict[str, Any], str, list[str]]:
    """Return a run's record, what the script printed, and what packlight said."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "run.json"
        command = [sys.executable, "-m", "packlight", "run", *options, "--record", str(record)]
        command += ["-m", "benchmarks.surprises_train", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        said = [line for line in done.stderr.splitlines() if line.startswith("packlight: ")]
        made: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        return made, done.stdout, said


def surprised(name: str) -> dict[str, Any]:
    """Run a surprise plain and planned."""
    shape, surprise, share = SURPRISES[name]
    # Plain training would end where memory runs out, and has nothing to do with the disk.
    harmless = surprise if surprise[:1] == ["--doubled-from"] else []
    plain, expected, _ = run(["--measure-only"], [*shape, *harmless])
    budget_bytes = plain["measurement"]["device_peak_bytes"] * share // 100
    with tempfile.TemporaryDirectory() as folder:
        disk = ["--disk", folder] * (shape is WIDE)
        record, printed, said = run(["--budget", str(budget_bytes), "--exact", *disk], [*shape, *surprise])
    measured, choices = record["measurement"], [each["choice"] for each in record["plan"]["choices"]]
    return {
        "surprise": name,
        "plain_peak_bytes": plain["measurement"]["device_peak_bytes"],
        "budget_bytes": budget_bytes,
        "peak_bytes": measured["device_peak_bytes"],
        "fits": measured["device_peak_bytes"] <= budget_bytes,
        "predicted_peak_bytes": record["estimate"]["device_peak_bytes"],
        "plan_peak_bytes": measured["plan_peak_bytes"],
        "same_losses": printed == expected,
        "plain_seconds": plain["measurement"]["step_seconds"],
        "step_seconds": measured["step_seconds"],
        "predicted_seconds": record["estimate"]["step_seconds"],
        "choices": {choice: choices.count(choice) for choice in sorted(set(choices))},
        "rates": {name: (record["plan"][name], measured[name]) for name in RATES},
        "said": said,
        "environment": record["environment"],
    }


def host_budgets() -> list[dict[str, Any]]:
    """Plan for a GPU with less and less host memory allowed."""
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True) for _ in range(16)]
        model, batch = nn.Sequential(*layers), torch.empty(8, 1024, 2048)
    optimizer = torch.optim.AdamW(model.parameters())
    rows = []
    for host_budget in ("64GiB", "8GiB", "2GiB", "256MiB"):
        made = packlight.plan(
            model,
            batch,
            optimizer,
            budget=packlight.Budget(24 * 2**30),
            loss=lambda output, _: output.square().mean(),
            host_budget=host_budget,
            exact=True,
            hardware="h100-80g",
        )
        choices = [choice.choice for choice in made.choices]
        rows.append({
            "host_budget": host_budget,
            "host_peak_bytes": made.estimate.host_peak_bytes,
            "device_peak_bytes": made.estimate.device_peak_bytes,
            "slowdown": made.estimate.slowdown,
            "choices": {choice: choices.count(choice) for choice in sorted(set(choices))},
        })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay the runs out for a reader."""
    made = Table(title="surprises under an exact plan")
    for title in (
        "surprise",
        "budget MiB",
        "peak",
        "final plan",
        "fits",
        "same losses",
        "s a step",
        "predicted",
        "said",
    ):
        made.add_column(title, justify="left" if title in ("surprise", "said") else "right")
    for row in rows:
        sizes = [f"{row[key] / 2**20:.1f}" for key in ("budget_bytes", "peak_bytes", "plan_peak_bytes")]
        times = [f"{row[key]:.3f}" for key in ("step_seconds", "predicted_seconds")]
        said = "\n".join(line.removeprefix("packlight: ")[:60] for line in row["said"])
        made.add_row(row["surprise"], *sizes, str(row["fits"]), str(row["same_losses"]), *times, said)
    return made


def main() -> None:
    """Run every surprise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    rows = [surprised(name) for name in SURPRISES]
    Console().print(table(rows))
    planned = host_budgets()
    Console().print_json(data=planned)
    failed = [row["surprise"] for row in rows if not (row["fits"] and row["same_losses"])]
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        made = {
            "command": ["python", "-m", "benchmarks.surprises", *sys.argv[1:]],
            "runs": rows,
            "host_budgets": planned,
        }
        options.output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if failed:
        sys.exit(f"above the budget, or with other losses: {', '.join(failed)}")


if __name__ == "__main__":
    main()
