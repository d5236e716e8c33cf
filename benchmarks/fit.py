"""Claim: a plan fits its budget, its predictions hold, and at a given peak nothing by hand is faster.

Each of twelve model families (`fit_families.py`) is trained as it is, at 80, 60, 40 and 25 % of that peak (or the least
that fits), in four ways that people save activations by hand, and planned again with each of those ways' peaks as the
budget. Every run is a process of its own and is measured by `packlight run`.

On a machine that others use, too, the time of a step drifts by more in a minute than the slowdowns that are to be told
apart. So all runs of a family live at once, as many as the memory holds, and take turns, a step each, and every second
one is followed by a plain step: a slowdown is the median over `--rounds` of a step over the mean of the plain ones
before and after it. Prints tables, and writes JSON and a page that plots slowdown against peak.

    python -m benchmarks.fit --output benchmarks/results/HARDWARE/fit.json
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fit_families import FAMILIES
from packlight.planner.operators import free_bytes
from packlight.planner.process import resident_bytes

ROOT = Path(__file__).parents[1]
SHARES = (80, 60, 40, 25)
WAYS = ("every-layer", "every-second", "products", "offload")
NO_PLAN = 3
"""Exit status where nothing fits."""
HOST_BUDGET = "64GiB"
"""For what is offloaded from a GPU."""
NUM_FOLLOWED = 3
"""Steps that `packlight run` follows, in which a plan is made, measured and mended; they are not timed."""
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""glibc gives freed memory back, and takes it page by page again in the next step, or does not, as sizes fall: the same
plain steps of a U-Net took none or 43,000 page faults in them, and 0.0 or 0.2 s for these. Here all runs keep theirs.
"""
MOST_REFUSALS = 3
"""What a first step shows of a loop may raise the smallest budget by a little."""
PER_PLAIN = 2
"""So many runs take a step between two plain ones."""
RESIDENT = 1.5
"""A run is taken to need at most so many times the memory of the plain process: MiniLM's took 1.23 times as much."""

Row = dict[str, Any]
Item = TypeVar("Item")


class Contestant:
    """One run of a family in a process of its own, under `packlight run`, which takes a step when told.

    Args:
        options: of `packlight run`.
        arguments: of `fit_families.py`.
        folder: for the record.
    """

    def __init__(self, options: Sequence[str], arguments: Sequence[str], *, folder: Path) -> None:
        self.seconds: list[float] = []
        self.over_plain: list[float] = []
        self._record = folder / "run.json"
        self._command = [sys.executable, "-m", "packlight", "run", *options, "--record", str(self._record)]
        self._command += ["-m", "benchmarks.fit_families", *arguments, "--turns"]
        with (folder / "errors").open("w+b") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            environment = os.environ | KEEPS_MEMORY
            self._process = subprocess.Popen(self._command, cwd=ROOT, env=environment, text=True, **pipes)  # type: ignore[call-overload]
        self._errors = folder / "errors"

    def step(self) -> float:
        """Take one step.

        Returns:
            Its seconds.

        Raises:
            Refused: nothing fits the budget.
            RuntimeError: the process ended otherwise.
        """
        with suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if found := re.match(r"step \d+ loss \S+ seconds (\S+)", line):
                return float(found[1])
        raise self._end()

    def resident_bytes(self) -> int:
        """Return the most memory that the process had so far."""
        return resident_bytes("VmHWM", self._process.pid)

    def finish(self) -> Row:
        """End the training; return the record."""
        self._process.communicate()
        if self._process.returncode != 0:
            raise self._end()
        made: Row = json.loads(self._record.read_text(encoding="utf-8"))
        return made

    def stop(self) -> None:
        """Let go of the process, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _end(self) -> Exception:
        status, errors = self._process.wait(), self._errors.read_text(encoding="utf-8")
        smallest = re.findall(r"smallest budget that fits is (\d+) bytes", errors)
        if status == NO_PLAN and smallest:
            return Refused(int(smallest[-1]))
        return RuntimeError(f"{' '.join(self._command)} ended with {status}:\n{errors}")


class Refused(Exception):
    """Nothing fits; `smallest_bytes` would."""

    def __init__(self, smallest_bytes: int) -> None:
        super().__init__(smallest_bytes)
        self.smallest_bytes = smallest_bytes


class Runs:
    """Starts runs of one family, and takes their processes down in the end.

    Args:
        family: its name.
        arguments: of every run, by name.
        disk: folder for what is offloaded from a CPU.
        exact: whether lossy choices are excluded.
    """

    def __init__(self, family: str, arguments: Mapping[str, Any], *, disk: str, exact: bool) -> None:
        self.family, self._disk = family, disk
        self._arguments = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        tier = ["--disk", disk] if arguments["device"] == "cpu" else ["--host-budget", HOST_BUDGET]
        self._options = ["--exact", *tier] if exact else tier
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Return the runs themselves."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End every process that is left."""
        self._stack.close()

    def by_hand(self, way: str) -> Contestant:
        """Begin to train without a plan, and take the steps that are followed."""
        return self._started(["--measure-only"], ["--way", way, "--folder", self._disk])

    def start(self, way: str, budget_bytes: int | None) -> tuple[Contestant, bool]:
        """Begin to train under a plan for a budget, or in a way by hand where there is none."""
        return (self.by_hand(way), False) if budget_bytes is None else self.planned(budget_bytes)

    def planned(self, budget_bytes: int) -> tuple[Contestant, bool]:
        """Begin to train under a plan, under the smallest budget that fits if this is less; return whether it is."""
        wanted_bytes = budget_bytes
        for _ in range(MOST_REFUSALS):
            try:
                return self._started(["--budget", str(wanted_bytes), *self._options], []), wanted_bytes > budget_bytes
            except Refused as refused:
                wanted_bytes = refused.smallest_bytes
        raise RuntimeError(
            f"{self.family} was refused {wanted_bytes} bytes, which were said to be the smallest that fit"
        )

    def peaks(self, ways: Sequence[str], *, num_live: int) -> dict[str, int]:
        """Return the peak of each way by hand, in runs beside each other that time nothing."""
        with ThreadPoolExecutor(num_live) as pool:
            records = pool.map(lambda way: self.by_hand(way).finish(), ways)
            peaks = [record["measurement"]["device_peak_bytes"] for record in records]
        return dict(zip(ways, peaks, strict=True))

    def _started(self, options: Sequence[str], arguments: Sequence[str]) -> Contestant:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        made = Contestant(options, [self.family, *self._arguments, *arguments], folder=folder)
        self._stack.callback(made.stop)
        for _ in range(NUM_FOLLOWED):
            made.step()
        return made


def take_turns(plain: Contestant, others: Sequence[Contestant], *, num_rounds: int) -> None:
    """Time steps one after the other, each between two plain ones, over whose mean it is divided."""
    before = plain.step()
    for _ in range(num_rounds):
        for pair in _batched(others, PER_PLAIN):
            seconds = [each.step() for each in pair]
            after = plain.step()
            plain.seconds.append(after)
            plain.over_plain.append(2 * after / (before + after))
            for each, own in zip(pair, seconds, strict=True):
                each.seconds.append(own)
                each.over_plain.append(2 * own / (before + after))
            before = after


def _batched(values: Iterable[Item], number: int) -> Iterator[list[Item]]:
    left = iter(values)
    while part := list(islice(left, number)):
        yield part


def most_live(plain: Contestant) -> int:
    """Return how many runs beside the plain one the memory holds, in whole pairs: a way and its plan are one.

    Raises:
        MemoryError: it does not hold a pair.
    """
    wanted_bytes, left_bytes = int(RESIDENT * plain.resident_bytes()), free_bytes(torch.device("cpu"))
    if left_bytes < PER_PLAIN * wanted_bytes:
        raise MemoryError(f"{left_bytes} bytes are free, and {PER_PLAIN} runs of {wanted_bytes} bytes were wanted")
    return left_bytes // wanted_bytes // PER_PLAIN * PER_PLAIN


def one_family(runs: Runs, shares: Iterable[int], ways: Sequence[str], *, num_rounds: int) -> list[Row]:
    """Return the rows of one family: plain, at shares of its peak, by hand, and planned at those peaks."""
    plain = runs.by_hand("plain")
    num_live = most_live(plain)
    peaks = runs.peaks(["plain", *ways], num_live=num_live)
    entrants: list[tuple[str, int | None]] = []
    for way in ways:
        entrants += [(way, None), (f"at {way}", peaks[way])]
    entrants += [(f"{share} %", peaks["plain"] * share // 100) for share in shares]
    rows: list[Row] = []
    for group in _batched(entrants, num_live):
        entries = [(way, *runs.start(way, budget_bytes)) for way, budget_bytes in group]
        take_turns(plain, [contestant for _, contestant, _ in entries], num_rounds=num_rounds)
        rows += [_row(runs.family, *entry) for entry in entries]
    return [_row(runs.family, "plain", plain, False), *rows]


def _row(family: str, way: str, contestant: Contestant, least: bool) -> Row:
    record = contestant.finish()
    measured = record["measurement"]
    peak_bytes = measured["device_peak_bytes"]
    row = {
        "family": family,
        "way": way,
        "peak_bytes": peak_bytes,
        "resident_peak_bytes": measured["resident_peak_bytes"],
        "step_seconds": statistics.median(contestant.seconds),
        "slowdown": statistics.median(contestant.over_plain),
        "slowdowns": contestant.over_plain,
        "seconds": contestant.seconds,
        "last_loss": measured["losses"]["last"][-1],
    }
    if record["plan"] is None:
        return row
    estimate, budget_bytes = record["estimate"], record["plan"]["budget_bytes"]
    return row | {
        "least": least,
        "budget_bytes": budget_bytes,
        "predicted_peak_bytes": estimate["device_peak_bytes"],
        "peak_error": estimate["device_peak_bytes"] / peak_bytes - 1,
        "fits": peak_bytes <= budget_bytes,
        "predicted_slowdown": estimate["slowdown"],
        "choices": Counter(choice["choice"] for choice in record["plan"]["choices"]),
        "state_formats": sorted(set(record["plan"]["state_formats"].values())),
        "environment": record["environment"],
    }


def headed(title: str, *columns: str) -> Table:
    """Return an empty table of families and ways, and of figures, which stand to the right."""
    made = Table("family", "way", title=title)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def table(rows: Iterable[Row]) -> Table:
    """Lay the rows out for a reader."""
    columns = ("budget MiB", "peak", "predicted", "error", "fits", "slowdown", "predicted ")
    made = headed("twelve families under budgets, and by hand", *columns)
    for row in rows:
        facts = [f"{row['peak_bytes'] / 2**20:.1f}", "", "", "", f"{row['slowdown']:.3f}", ""]
        budget = ""
        if "fits" in row:
            budget = f"{row['budget_bytes'] / 2**20:.1f}{' (least)' if row['least'] else ''}"
            facts[1:4] = f"{row['predicted_peak_bytes'] / 2**20:.1f}", f"{row['peak_error']:+.2%}", str(row["fits"])
            facts[5] = f"{row['predicted_slowdown']:.3f}"
        made.add_row(row["family"], row["way"], budget, *facts)
    return made


def verdict(rows: Sequence[Row]) -> dict[str, Any]:
    """Say how the claims came out."""
    planned = [row for row in rows if "fits" in row and row["way"].endswith("%")]
    errors = [abs(row["peak_error"]) for row in planned]
    points = [abs(row["slowdown"] - row["predicted_slowdown"]) * 100 for row in planned]
    by_hand = {(row["family"], row["way"]): row for row in rows if "fits" not in row}
    beside = {
        f"{row['family']} {row['way']}": row["slowdown"] / by_hand[row["family"], row["way"][3:]]["slowdown"]
        for row in rows
        if row["way"].startswith("at ")
    }
    return {
        "num_planned": len(planned),
        "num_over_budget": sum(not row["fits"] for row in rows if "fits" in row),
        "largest_peak_error": max(errors),
        "median_peak_error": statistics.median(errors),
        "largest_slowdown_error_points": max(points),
        "median_slowdown_error_points": statistics.median(points),
        "num_slower_than_by_hand": sum(ratio > 1 for ratio in beside.values()),
        "median_over_by_hand": statistics.median(beside.values()) if beside else None,
        "over_by_hand": beside,
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw step time against peak, one panel a family, as a page that loads plotly's script from the net."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    names = list(dict.fromkeys(row["family"] for row in rows))
    columns = min(4, len(names))
    figure = make_subplots(-(-len(names) // columns), columns, subplot_titles=names)
    for at, name in enumerate(names):
        own = [row for row in rows if row["family"] == name]
        place = {"row": at // columns + 1, "col": at % columns + 1}
        planned = sorted((row for row in own if "fits" in row), key=lambda row: row["peak_bytes"])
        lines = {"packlight": planned, **{way: [row for row in own if row["way"] == way] for way in ("plain", *WAYS)}}
        for number, (way, points) in enumerate(lines.items()):
            peaks, times = _points(points)
            colour = f"hsl({number * 60}, 60%, 45%)"
            marks = {"name": way, "legendgroup": way, "showlegend": at == 0, "line_color": colour}
            figure.add_trace(Scatter(x=peaks, y=times, mode="lines+markers", **marks), **place)
    figure.update_xaxes(title_text="peak, MiB").update_yaxes(title_text="step time over plain")
    figure.write_html(path, include_plotlyjs="cdn")


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["peak_bytes"] / 2**20 for row in rows], [row["slowdown"] for row in rows]


def write(rows: Sequence[Row], path: Path, before: Row) -> None:
    """Write what there is so far, and draw it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "benchmarks.fit", *sys.argv[1:]]
    told = {"command": before["command"], "again": [*before.get("again", []), command]} if before else {}
    made = {"command": command, **told, "allocator": KEEPS_MEMORY, "verdict": verdict(rows), "rows": rows}
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    plot(rows, path.with_suffix(".html"))


def main() -> None:
    """Run every family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each run")
    parser.add_argument("--ways", default=",".join(WAYS), help="by hand, comma-separated; may be empty")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="factor of the models' widths and lengths")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the plain peak, in percent")
    parser.add_argument("--exact", action="store_true", help="exclude lossy choices")
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="folder for what is offloaded from a CPU")
    parser.add_argument("--output", type=Path, help="where to write rows and verdict as JSON, and the plot beside it")
    parser.add_argument("--again", action="store_true", help="put rows in the place of the output's for these families")
    options = parser.parse_args()
    if options.again and not options.output:
        parser.error("--again puts rows into a record; wanted --output too")
    console, families = Console(), options.families.split(",")
    before = json.loads(options.output.read_text(encoding="utf-8")) if options.again else {}
    rows = [row for row in before.get("rows", []) if row["family"] not in families]
    for family in families:
        arguments = {name: getattr(options, name) for name in ("device", "scale")}
        ways = [way for way in options.ways.split(",") if way]
        shares = [int(share) for share in options.shares.split(",")]
        with Runs(family, arguments, disk=options.disk, exact=options.exact) as runs:
            own = one_family(runs, shares, ways, num_rounds=options.rounds)
        console.print(table(own))
        rows = sorted([*rows, *own], key=lambda row: list(FAMILIES).index(row["family"]))
        if options.output:  # after each family: all of them take an hour
            write(rows, options.output, before)
    console.print_json(data=verdict(rows))


if __name__ == "__main__":
    main()
