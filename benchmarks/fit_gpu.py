"""Claim: on a GPU a plan fits its budget too, and its predictions hold, with pinned host memory and without.

`fit.py` runs each script in a process of its own; here the families of `fit_families.py` are trained in one process
through `packlight.fit`, because a GPU's time is dear. Peaks are the allocator's. Prints a table, and writes JSON.

    python -m benchmarks.fit_gpu --scale 2 --output benchmarks/results/HARDWARE/fit_gpu.json
"""

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import packlight
from benchmarks.fit_families import FAMILIES, Family
from packlight.integrations.script import environment

DEFAULT = "llama,bert,t5,vit,resnet,unet,mixtral,lora,selective"
HOST_BUDGETS = (None, "32GiB")
NUM_STEPS, NUM_TIMED_STEPS = 4, 5
MIB = 2**20

Row = dict[str, Any]


class Whole(nn.Module):
    """A family's model with its loss inside, so that every family is called alike."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.model, self._loss = family.model, family.loss

    def forward(self, **batch: Tensor) -> Tensor:
        """Return the loss of a batch."""
        return self._loss(self.model, batch)


class Training:
    """One family on the GPU, with AdamW and one batch."""

    def __init__(self, name: str, scale: int) -> None:
        torch.manual_seed(0)
        self.name, family = name, FAMILIES[name](scale)
        self.model = Whole(family).cuda().train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.batch = {key: value.cuda() for key, value in family.batch().items()}

    def step(self) -> None:
        """Do one."""
        loss = self.model(**self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_bytes(self) -> int:
        """Do a step, and return the most that the allocator had given out."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def seconds(self) -> float:
        """Return the median time of some steps."""
        return statistics.median(_timed(self.step) for _ in range(NUM_TIMED_STEPS))

    def planned(self, budget: int, host_budget: str | None) -> Row:
        """Train under a plan, or under the least that fits, for as long as it may be mended, and measure then."""
        gc.collect()
        asked: dict[str, Any] = {"loss": lambda output, _: output, "exact": True, "host_budget": host_budget}
        try:
            handle = packlight.fit(self.model, self.optimizer, self.batch, budget=budget, **asked)
        except packlight.BudgetError as error:
            budget = error.smallest_bytes
            handle = packlight.fit(self.model, self.optimizer, self.batch, budget=budget, **asked)
        with handle:
            first = handle.plan
            peaks = [self.peak_bytes() for _ in range(NUM_STEPS)]
            last, seconds = handle.plan, self.seconds()
        counts: dict[str, int] = {}
        for choice in last.choices:
            counts[choice.choice] = counts.get(choice.choice, 0) + 1
        return {
            "family": self.name,
            "host_budget": host_budget,
            "budget_bytes": budget,
            "predicted_peak_bytes": first.estimate.device_peak_bytes,
            "peak_bytes_by_step": peaks,
            "peak_error": first.estimate.device_peak_bytes / peaks[0] - 1,
            "mended": last is not first,
            "mended_predicted_peak_bytes": last.estimate.device_peak_bytes,
            "mended_peak_error": last.estimate.device_peak_bytes / peaks[-1] - 1,
            "fits": [peak <= budget for peak in peaks],
            "step_seconds": seconds,
            "predicted_slowdown": last.estimate.slowdown,
            "choices": counts,
        }


def _timed(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def rows_of(name: str, scale: int, shares: list[int]) -> Iterator[Row]:
    """Measure one family: as it is, and at shares of that peak.

    Args:
        name: the family's.
        scale: of its widths and lengths.
        shares: in percent.

    Yields:
        A row for each run.
    """
    training = Training(name, scale)
    plan = packlight.plan(training.model, training.batch, training.optimizer, budget="99%", loss=lambda out, _: out)
    for _ in range(2):
        training.step()
    peak_bytes, seconds = training.peak_bytes(), training.seconds()
    predicted_bytes = plan.estimate.plain_peak_bytes
    yield {
        "family": name,
        "peak_bytes_by_step": [peak_bytes],
        "predicted_peak_bytes": predicted_bytes,
        "peak_error": predicted_bytes / peak_bytes - 1,
        "step_seconds": seconds,
        "predicted_step_seconds": plan.estimate.step_seconds,
    }
    for host_budget in HOST_BUDGETS:
        for share in shares:
            row = training.planned(peak_bytes * share // 100, host_budget)
            yield {**row, "share": share, "slowdown": row["step_seconds"] / seconds}


def table(rows: list[Row]) -> Table:
    """Lay the rows out for a reader."""
    made = Table(title="families under budgets on a GPU")
    for title in (
        "family",
        "share",
        "host",
        "budget",
        "predicted",
        "peaks MiB",
        "error",
        "mended",
        "slowdown",
        "pred.",
    ):
        made.add_column(title)
    for row in rows:
        peaks = " ".join(f"{peak / MIB:.1f}" for peak in row["peak_bytes_by_step"])
        predicted, error = f"{row['predicted_peak_bytes'] / MIB:.1f}", f"{row['peak_error']:+.2%}"
        if "share" not in row:
            speeds = f"{row['step_seconds'] * 1e3:.1f} ms", f"{row['predicted_step_seconds'] * 1e3:.1f} ms"
            made.add_row(row["family"], "plain", "", "", predicted, peaks, error, "", *speeds)
            continue
        facts = str(row["share"]), row["host_budget"] or "", f"{row['budget_bytes'] / MIB:.1f}", predicted, peaks, error
        mended = f"{row['mended_peak_error']:+.2%}" if row["mended"] else ""
        made.add_row(row["family"], *facts, mended, f"{row['slowdown']:.2f}", f"{row['predicted_slowdown']:.2f}")
    return made


def main() -> None:
    """Run every family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=DEFAULT, help="comma-separated")
    parser.add_argument("--scale", type=int, default=2, help="factor of the models' widths and lengths")
    parser.add_argument("--shares", default="60,40", help="of the plain peak, in percent")
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # a plan that is mended says so; it is in the rows
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with suppress(KeyboardInterrupt):  # what is measured by then is written
        for name in options.families.split(","):
            try:
                rows += rows_of(name, options.scale, [int(share) for share in options.shares.split(",")])
            except Exception as error:  # one family shall not cost the others; its words stand in the record
                failed[name] = f"{type(error).__name__}: {error}"
            torch.cuda.empty_cache()
            if options.output:
                made = {"command": sys.argv, "environment": environment(), "failed": failed, "rows": rows}
                options.output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    console = Console(width=150)
    console.print(table(rows))
    console.print(failed)


if __name__ == "__main__":
    main()
