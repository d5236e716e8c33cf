"""Claim: what a step keeps for backward is kept, recomputed, moved or encoded at the cost that it must have.

    overhead    an engine that keeps everything costs at most 2 %                          activations_hooks.py
    recompute   packlight.recompute costs at most 2 % more than torch's checkpoint         activations_hooks.py
    disk        the resident peak falls by at least 90 % of the bytes offloaded to a disk  activations_disk.py
    compress    what each codec saves, costs and changes                                   activations_codecs.py
    leaks       2,000 steps with every choice, and with failures, leave nothing behind     activations_leaks.py
    gpu         the same on a GPU, beside torch's and others' ways                         activations_gpu.py

    python -m benchmarks.activations all --output benchmarks/results/HARDWARE/activations.json
    python -m benchmarks.activations gpu --output benchmarks/results/HARDWARE/activations.json

`--tiny` runs all of it in a minute or two with sizes that say nothing, to see that it runs.
"""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.activations_codecs import Training, compress
from benchmarks.activations_disk import disk
from benchmarks.activations_gpu import gpu
from benchmarks.activations_hooks import overhead, recomputation
from benchmarks.activations_leaks import leaks
from benchmarks.activations_steps import Record
from packlight.demo.train_gpt import Shape
from packlight.integrations.script import environment

PACKAGES = ("triton", "torchtune", "trl")
TINY = Shape(context=32, width=64, num_layers=2, num_heads=2)
HOOKS = Shape(context=128, width=256, num_layers=12, num_heads=4)
#: A gigabyte of activations of at most 16 MiB each, over two megabytes of weights.
DISK = Shape(context=256, width=128, num_layers=16, num_heads=4)
TRAINED = Shape(context=128, width=128, num_layers=4, num_heads=4)

#: In the JSON only.
UNSHOWN = {
    "sample_seconds",
    "least_seconds",
    "paired_quartiles",
    "pinned_by_torch",
    "resident_before_bytes",
    "most_stored_bytes",
    "direct",
    "write_bytes_per_second",
    "read_bytes_per_second",
    "seconds_per_element",
    "no_codec_lowest",
    "no_codec_highest",
    "lossy",
}

console = Console(width=140)


def _overhead(rounds: int, tiny: bool) -> Record:
    return overhead(TINY if tiny else HOOKS, batch=8, rounds=rounds)


def _recompute(rounds: int, tiny: bool) -> Record:
    return recomputation(TINY if tiny else HOOKS, batch=8, rounds=rounds)


def _disk(rounds: int, tiny: bool) -> Record:
    return disk(TINY if tiny else DISK, batch=32, rounds=max(2, rounds // 4))


def _compress(rounds: int, tiny: bool) -> Record:
    if tiny:
        training = Training(TINY, batch=4, num_steps=20, seeds=(0,))
        return compress(TINY, batch=8, rounds=rounds, training=training)
    training = Training(TRAINED, batch=16, num_steps=300, seeds=(0, 1, 2))
    return compress(Shape(), batch=8, rounds=max(2, rounds // 4), training=training)


def _leaks(rounds: int, tiny: bool) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        return leaks(Path(folder), num_steps=90 if tiny else 100, num_rounds=2 if tiny else 4)


def _gpu(rounds: int, tiny: bool) -> Record:
    return gpu(rounds=rounds, device="cpu" if tiny else "cuda")


PARTS: dict[str, Callable[[int, bool], Record]] = {
    "overhead": _overhead,
    "recompute": _recompute,
    "disk": _disk,
    "compress": _compress,
    "leaks": _leaks,
    "gpu": _gpu,
}
ALL = tuple(name for name in PARTS if name != "gpu")


@click.command(help=__doc__)
@click.argument("names", nargs=-1, required=True, type=click.Choice([*PARTS, "all"]))
@click.option("--rounds", type=click.IntRange(2), default=40, help="of each comparison; long steps take fewer")
@click.option("--tiny", is_flag=True, help="sizes that say nothing; gpu then runs on the CPU")
@click.option("--output", type=click.Path(path_type=Path), help="where to write the figures as JSON")
def main(names: tuple[str, ...], rounds: int, tiny: bool, output: Path | None) -> None:
    """Measure, print and write."""
    load = os.getloadavg()[0]
    if load > 0.5 and not tiny:
        console.print(f"load average {load:.1f}: something else runs here; these times say little", style="red")
    if "gpu" in names and not tiny and not torch.cuda.is_available():
        raise click.UsageError("gpu came, but torch sees no CUDA device here; --tiny runs it on the CPU")
    found: dict[str, Record] = {}
    for name in dict.fromkeys(each for given in names for each in (ALL if given == "all" else (given,))):
        began = time.perf_counter()
        found[name] = PARTS[name](rounds, tiny)
        found[name]["seconds_taken"] = time.perf_counter() - began
        for table in tables(name, found[name]):
            console.print(table)
        _write(output, found, load)  # a long run that is stopped leaves its part


def tables(name: str, record: Mapping[str, Any]) -> list[Table]:
    """Lay out what was measured.

    Args:
        name: of the part.
        record: its figures.

    Returns:
        Tables of rows, one for each list of them, and one of claims.
    """
    lists = {name: record.get("rows", []), f"{name}: resident": record.get("resident", [])}
    lists |= {f"{name}: {group['group']}": group["rows"] for group in record.get("groups", [])}
    training = record.get("training", {})
    lists[f"{name}: held-out loss"] = training.get("summary", [])
    made = [_table(title, rows) for title, rows in lists.items() if rows]
    return [*made, _table(f"{name}: claims", record["claims"])] if record["claims"] else made


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title)
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in UNSHOWN]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(_cell(column, row.get(column, "")) for column in columns))
    return table


def _cell(column: str, value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_cell(column, each) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if value is None or isinstance(value, str):
        return value or ""
    if column.endswith("_bytes") or column in ("bytes_out", "bytes_in"):
        return f"{value / 2**20:,.1f}M"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _write(output: Path | None, found: Mapping[str, Record], load: float) -> None:
    if output is None:
        return
    installed = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.activations", *sys.argv[1:]]),
        "environment": {**environment(), **versions, "load_averages": [load, os.getloadavg()[0]]},
        **found,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
