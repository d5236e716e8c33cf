"""`packlight demo`: the same small training run, plain and planned."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console

from packlight.cli.output import output_file
from packlight.records import Run
from packlight.report import text


@click.command()
@click.option("--budget", metavar="BYTES", help="Budget of the planned run. Default: half the plain run's peak.")
@click.option("--steps", default=14, show_default=True, help="Training steps of each run.")
@click.option("--record", metavar="FILE", help="Write the planned run's record to this JSON file.")
def demo(*, budget: str | None, steps: int, record: str | None) -> None:
    """Train a small byte-level language model on the standard library's sources, plain and planned."""
    console, target = Console(), output_file("--record", record)
    with tempfile.TemporaryDirectory() as folder:
        plain, plain_loss = _demo_run(console, Path(folder), "plain", ["--measure-only"], steps=steps)
        budget = budget or str(plain.measurement.device_peak_bytes // 2)
        planned, planned_loss = _demo_run(console, Path(folder), "planned", ["--budget", budget], steps=steps)
        if target is not None:
            planned.save(target)
    losses = {"plain": plain_loss, "planned": planned_loss}
    console.print(text.comparison({"plain": plain, "planned": planned}, losses))


def _demo_run(console: Console, folder: Path, name: str, options: list[str], *, steps: int) -> tuple[Run, float]:
    """Run the demo's training script in a process of its own; return its record and its held-out loss."""
    script = Path(__file__).parents[1] / "demo" / "train_gpt.py"
    record, result = folder / f"{name}.json", folder / f"{name}-result.json"
    console.print(f"[bold]{name}[/bold]")
    command = [sys.executable, "-m", "packlight", "run", *options, "--record", os.fspath(record), os.fspath(script)]
    done = subprocess.run([*command, "--steps", str(steps), "--result", os.fspath(result)], check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return Run.load(record), float(json.loads(result.read_text(encoding="utf-8"))["held_out_loss"])
