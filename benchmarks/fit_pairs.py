"""Claim: a plan's peak and its slowdown are what it predicts, where the step as it is is timed right beside it.

`fit.py` compares processes, minutes apart. On a machine that others use, too, a step's time drifts by more than the
slowdowns that are to be told apart. Here each family of `fit_families.py` has one process: plain steps, then a session
under 80, 60, 40 or 25 % of the plain peak (or the least that fits), which plans and mends as `packlight run` does, then
plain steps again. Two things are otherwise than under that command: the optimiser has its states before the first
planned step, and operators are measured once for all four plans of a family.

A slowdown is the median planned step over the median of the plain ones on both sides; how far these differ from each
other is written beside it. `--rounds` repeats all of it, and medians are taken.

    python -m benchmarks.fit_pairs --output benchmarks/results/HARDWARE/fit_pairs.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fit import ROOT, SHARES, Row, headed
from benchmarks.fit_families import FAMILIES, Family
from packlight.budget import BudgetError
from packlight.integrations.script import environment
from packlight.planner.guest import Guest

NUM_PLAIN = 4
"""Plain steps on each side; the first of them is not timed."""
NUM_PLANNED = 8
NUM_TIMED = 5
"""Planned steps, and how many of the last ones are timed: in the first three a plan is made, measured and mended."""
MOST_REFUSALS = 4
"""A first step may show that a little more lives beside it, and what was measured for the last plan lives on."""
MEDIANS = ("plain_seconds", "step_seconds", "slowdown", "predicted_slowdown", "slowdown_error", "drift")


class Loop:
    """Trains one family, now as it is, now under a plan."""

    def __init__(self, family: Family) -> None:
        self._family = family
        trained = [parameter for parameter in family.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        family.model.train()

    def steps(self, number: int) -> list[float]:
        """Take steps; return the seconds of each."""
        seconds = []
        for _ in range(number):
            batch = self._family.batch()
            start = time.perf_counter()
            loss = self._family.loss(self._family.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
        return seconds

    def plain_peak(self) -> int:
        """Return the live peak of the training as it is."""
        with (guest := Guest(None)).during(self.optimizer):
            self.steps(3)
        assert guest.measurement is not None
        return guest.measurement.device_peak_bytes

    def planned_or_smallest(self, budget_bytes: int, disk: str) -> Row | int:
        """Take steps under a plan, between plain ones; where there is none, return the smallest budget that fits."""
        try:
            return self.planned(budget_bytes, disk)
        except BudgetError as error:
            if error.smallest_bytes is None:
                raise
            self.optimizer.zero_grad()  # the refusal may have come after backward
            return error.smallest_bytes

    def planned(self, budget_bytes: int, disk: str) -> Row:
        """Take steps under a plan, between plain ones."""
        before, guest = self.steps(NUM_PLAIN)[1:], Guest(budget_bytes, disk=disk)
        with guest.during(self.optimizer):
            seconds = self.steps(NUM_PLANNED)[-NUM_TIMED:]
        after = self.steps(NUM_PLAIN)[1:]
        plan, measured = guest.plan, guest.measurement
        assert plan is not None and measured is not None
        plain_seconds = statistics.median([*before, *after])
        predicted_bytes, peak_bytes = plan.estimate.device_peak_bytes, measured.device_peak_bytes
        return {
            "budget_bytes": plan.budget_bytes,
            "predicted_peak_bytes": predicted_bytes,
            "peak_bytes": peak_bytes,
            "peak_error": predicted_bytes / peak_bytes - 1,
            "fits": peak_bytes <= plan.budget_bytes,
            "plain_seconds": plain_seconds,
            "step_seconds": statistics.median(seconds),
            "slowdown": statistics.median(seconds) / plain_seconds,
            "predicted_slowdown": plan.estimate.slowdown,
            "slowdown_error": abs(statistics.median(seconds) / plain_seconds - plan.estimate.slowdown),
            "drift": abs(statistics.median(after) / statistics.median(before) - 1),
            "choices": Counter(choice.choice for choice in plan.choices),
            "state_formats": sorted(set(plan.state_formats.values())),
        }


def one_family(name: str, shares: Sequence[int], disk: str) -> list[Row]:
    """Return the rows of one family; to be called in a process of its own."""
    torch.manual_seed(0)
    loop, rows = Loop(FAMILIES[name](1)), []
    plain_bytes = loop.plain_peak()
    for share in shares:
        asked = wanted = plain_bytes * share // 100
        for _ in range(1 + MOST_REFUSALS):
            row = loop.planned_or_smallest(wanted, disk)
            if not isinstance(row, int):
                break
            wanted = row
        else:
            raise RuntimeError(f"{name} was refused {wanted} bytes, which were said to be the smallest that fit")
        facts = {"family": name, "way": f"{share} %", "least": wanted > asked, "plain_peak_bytes": plain_bytes}
        rows.append(facts | row)
    return rows


def in_own_process(name: str, shares: str, disk: str) -> list[Row]:
    """Return the rows of one family."""
    command = [sys.executable, "-m", "benchmarks.fit_pairs", "--one", name, "--shares", shares, "--disk", disk]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def merged(rounds: Sequence[Sequence[Row]]) -> list[Row]:
    """Return one row for each plan: times are medians over rounds, whose rows stay beside them; the worst peak stands.

    A slowdown's error is the median of its rounds' own, each of a plan against its steps.
    """
    made = []
    for rows in zip(*rounds, strict=True):
        worst = max(rows, key=lambda row: abs(row["peak_error"]))
        times = {key: statistics.median(row[key] for row in rows) for key in MEDIANS}
        made.append({**worst, **times, "fits": all(row["fits"] for row in rows), "rounds": list(rows)})
    return made


def table(rows: Sequence[Row]) -> Table:
    """Lay the rows out for a reader."""
    columns = ("budget MiB", "predicted", "measured", "error", "slowdown", "predicted ", "drift")
    made = headed("families under budgets, beside themselves as they are", *columns)
    for row in rows:
        sizes = [f"{row[key] / 2**20:.1f}" for key in ("budget_bytes", "predicted_peak_bytes", "peak_bytes")]
        times = [f"{row['peak_error']:+.2%}", f"{row['slowdown']:.3f}", f"{row['predicted_slowdown']:.3f}"]
        made.add_row(row["family"], row["way"] + " (least)" * row["least"], *sizes, *times, f"{row['drift']:.1%}")
    return made


def verdict(rows: Sequence[Row]) -> dict[str, Any]:
    """Say how the claims came out."""
    errors = [abs(row["peak_error"]) for row in rows]
    points = [row["slowdown_error"] * 100 for row in rows]
    return {
        "num_plans": len(rows),
        "num_over_budget": sum(not row["fits"] for row in rows),
        "largest_peak_error": max(errors),
        "median_peak_error": statistics.median(errors),
        "num_slowdowns_off_by_more_than_10_points": sum(each > 10 for each in points),
        "largest_slowdown_error_points": max(points),
        "median_slowdown_error_points": statistics.median(points),
        "median_drift": statistics.median(row["drift"] for row in rows),
    }


def main() -> None:
    """Run every family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the plain peak, in percent")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="folder for what is offloaded")
    parser.add_argument("--output", type=Path, help="where to write rows and verdict as JSON")
    parser.add_argument("--one", choices=FAMILIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_family(options.one, [int(each) for each in options.shares.split(",")], options.disk)))
        return
    console, rows = Console(width=120), []
    for name in options.families.split(","):
        rounds = [in_own_process(name, options.shares, options.disk) for _ in range(options.rounds)]
        own = merged(rounds)
        console.print(table(own))
        rows += own
        if options.output:  # after each family: all of them take half an hour
            made = {
                "command": ["python", "-m", "benchmarks.fit_pairs", *sys.argv[1:]],
                "environment": environment(),
                "verdict": verdict(rows),
                "rows": rows,
            }
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    console.print_json(data=verdict(rows))


if __name__ == "__main__":
    main()
