"""Claim: a plan fits its budget, its predictions hold, and at a given peak nothing by hand is faster.

Each of twelve model families (`fit_families.py`) is trained as it is, at 80, 60, 40 and 25 % of that peak (or the least
that fits), in four ways that people save activations by hand, and planned again with each of those ways' peaks as the
budget. Every run is a process of its own and is measured by `packlight run`; `--rounds` repeats all of it, and times
are medians over rounds of the median step. Prints tables, and writes JSON and a page that plots step time against peak.

    python -m benchmarks.fit --rounds 3 --output benchmarks/results/HARDWARE/fit.json
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fit_families import FAMILIES

ROOT = Path(__file__).parents[1]
SHARES = (80, 60, 40, 25)
WAYS = ("every-layer", "every-second", "products", "offload")
NO_PLAN = 3
"""Exit status where nothing fits."""
HOST_BUDGET = "64GiB"
"""For what is offloaded from a GPU."""
REPEATED = ("step_seconds", "slowdown")

Row = dict[str, Any]


class Runs:
    """Runs one family in processes of its own.

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

    def by_hand(self, way: str) -> Row:
        """Train without a plan."""
        record = self._run(["--measure-only"], ["--way", way, "--folder", self._disk])
        assert isinstance(record, dict)
        return {"family": self.family, "way": way, **_measured(record)}

    def planned(self, budget_bytes: int, name: str) -> Row:
        """Train under a plan; where the budget is too small, under the smallest that fits."""
        outcome = self._run(["--budget", str(budget_bytes), *self._options], [])
        least = isinstance(outcome, int)
        record = outcome
        if isinstance(outcome, int):
            record = self._run(["--budget", str(outcome), *self._options], [])
        assert isinstance(record, dict)
        estimate, peak_bytes = record["estimate"], record["measurement"]["device_peak_bytes"]
        return {
            "family": self.family,
            "way": name,
            "least": least,
            "budget_bytes": record["plan"]["budget_bytes"],
            **_measured(record),
            "predicted_peak_bytes": estimate["device_peak_bytes"],
            "peak_error": estimate["device_peak_bytes"] / peak_bytes - 1,
            "fits": peak_bytes <= record["plan"]["budget_bytes"],
            "predicted_slowdown": estimate["slowdown"],
            "choices": Counter(choice["choice"] for choice in record["plan"]["choices"]),
            "state_formats": sorted(set(record["plan"]["state_formats"].values())),
            "environment": record["environment"],
        }

    def _run(self, options: Sequence[str], arguments: Sequence[str]) -> dict[str, Any] | int:
        """Return a run's record, or the smallest budget that fits."""
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "run.json"
            command = [sys.executable, "-m", "packlight", "run", *options, "--record", str(record)]
            command += ["-m", "benchmarks.fit_families", self.family, *self._arguments, *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode == NO_PLAN:
                return int(re.findall(r"smallest budget that fits is (\d+) bytes", done.stderr)[-1])
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
            made: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            return made


def _measured(record: dict[str, Any]) -> Row:
    measured = record["measurement"]
    return {
        "peak_bytes": measured["device_peak_bytes"],
        "resident_peak_bytes": measured["resident_peak_bytes"],
        "step_seconds": measured["step_seconds"],
        "last_loss": measured["losses"]["last"][-1],
    }


def one_round(runs: Runs, shares: Iterable[int], ways: Sequence[str]) -> list[Row]:
    """Return the rows of one family: plain, at shares of its peak, by hand, and planned at those peaks."""
    plain = runs.by_hand("plain")
    rows = [plain]
    for share in shares:
        rows.append(runs.planned(plain["peak_bytes"] * share // 100, f"{share} %"))
    for way in ways:
        rows.append(runs.by_hand(way))
        rows.append(runs.planned(rows[-1]["peak_bytes"], f"at {way}"))
    for row in rows:
        row["slowdown"] = row["step_seconds"] / plain["step_seconds"]
    return rows


def merged(rounds: Sequence[Sequence[Row]]) -> list[Row]:
    """Return one row for each run: times are medians over rounds, and the worst of peaks and errors stands."""
    made = []
    for rows in zip(*rounds, strict=True):
        row = dict(rows[0])
        row.update({key: statistics.median(each[key] for each in rows) for key in REPEATED})
        row["peak_bytes"] = max(each["peak_bytes"] for each in rows)
        row["slowdowns"] = [each["slowdown"] for each in rows]
        if "fits" in row:
            row["fits"] = all(each["fits"] for each in rows)
            row["peak_error"] = max((each["peak_error"] for each in rows), key=abs)
            row["predicted_slowdown"] = statistics.median(each["predicted_slowdown"] for each in rows)
        made.append(row)
    return made


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


def write(rows: Sequence[Row], path: Path) -> None:
    """Write what there is so far, and draw it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"command": ["python", "-m", "benchmarks.fit", *sys.argv[1:]], "verdict": verdict(rows), "rows": rows}
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    plot(rows, path.with_suffix(".html"))


def main() -> None:
    """Run every family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ways", default=",".join(WAYS), help="by hand, comma-separated; may be empty")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="factor of the models' widths and lengths")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the plain peak, in percent")
    parser.add_argument("--exact", action="store_true", help="exclude lossy choices")
    parser.add_argument("--disk", default=tempfile.gettempdir(), help="folder for what is offloaded from a CPU")
    parser.add_argument("--output", type=Path, help="where to write rows and verdict as JSON, and the plot beside it")
    options = parser.parse_args()
    console, rows = Console(), []
    for family in options.families.split(","):
        arguments = {name: getattr(options, name) for name in ("steps", "device", "scale")}
        runs = Runs(family, arguments, disk=options.disk, exact=options.exact)
        ways = [way for way in options.ways.split(",") if way]
        shares = [int(share) for share in options.shares.split(",")]
        own = merged([one_round(runs, shares, ways) for _ in range(options.rounds)])
        console.print(table(own))
        rows += own
        if options.output:  # after each family: all of them take an hour
            write(rows, options.output)
    console.print_json(data=verdict(rows))


if __name__ == "__main__":
    main()
