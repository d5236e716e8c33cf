"""What the tables of the proof page are made of: records, the commands that made them, Markdown, goals.

A figure that is typed into a page is right on the day it is typed. Here a table is a function of a committed record, so
that a figure on the page cannot differ from what was measured; `proof.py` puts the tables on the page and compares
them. A command is the record's own where it has one, else the one in the docstring of the benchmark that wrote it.
"""

import ast
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
CPU, CPU_AVX2, CPU_AVX512, GPU, SIMULATED = (
    "cpu-2-cores-amd-epyc",
    "cpu-2-cores-amd-epyc-avx2",
    "cpu-2-cores-intel-xeon-avx512",
    "nvidia-h100-80gb-hbm3",
    "simulated",
)
"""Folders of records, one a machine."""
NOT_VERSIONS = {"hardware", "num_cpus", "num_threads", "platform", "ranks", "load_averages"}
"""What an environment holds besides versions."""

Record = Any
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Proof:
    """One table of the page.

    Args:
        name: of its place on the page.
        claim: what the table shows, in one sentence.
        record: the file below `results` that it is made from.
        command: what made the record.
        machine: hardware and versions.
        header: of the columns; the first is left-aligned.
        rows: the cells.
        goals: what was asked for, and how that came out; may be empty.
    """

    name: str
    claim: str
    record: str
    command: str
    machine: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    goals: Sequence[str] = ()

    def markdown(self) -> str:
        """Lay the proof out as it stands on the page."""
        made_on = f"{self.machine}; record: `results/{self.record}`"
        parts = [f"**{self.claim}**", f"    {self.command}", made_on, _table(self.header, self.rows)]
        parts += ["\n".join(f"- {goal}" for goal in self.goals)] if self.goals else []
        return "\n\n".join(parts)

    def row(self, first: str) -> Sequence[str]:
        """Return the row that begins so."""
        (found,) = (row for row in self.rows if row[0] == first)
        return found

    def cell(self, first: str, column: str, *, nth: int = 0) -> str:
        """Return the cell of the row that begins so, below the nth header of that name."""
        return self.row(first)[self._at(column, nth)]

    def column(self, name: str) -> list[str]:
        """Return all cells below the first header of that name."""
        return [row[self._at(name, 0)] for row in self.rows]

    def _at(self, column: str, nth: int) -> int:
        return [at for at, header in enumerate(self.header) if header == column][nth]


@cache
def read(record: str) -> Record:
    """Return a record below `results`; shared, so nobody changes it."""
    return json.loads((RESULTS / record).read_text(encoding="utf-8"))


def recorded_command(record: str) -> str:
    """Return the command that a record names, as one line."""
    command = read(record)["command"]
    return command if isinstance(command, str) else shlex.join(command)


def documented_command(benchmark: str, record: str) -> str:
    """Return the command in a benchmark's docstring that writes a record of this name, which names none itself."""
    text = ast.get_docstring(ast.parse((FOLDER / benchmark).read_text(encoding="utf-8"))) or ""
    folder, _, name = record.rpartition("/")
    found = [line.strip() for line in text.splitlines() if line.startswith("    ") and line.endswith(f"/{name}")]
    if len(found) != 1:
        raise ValueError(f"{benchmark} has {len(found)} commands that write {name}; its docstring has to have one")
    return found[0].replace("HARDWARE", folder)


def machine(*environments: Row) -> str:
    """Name the hardware and the versions of a record, which has one environment, or equal ones for all its rows."""
    named = {_named(environment) for environment in environments}
    if len(named) != 1:
        raise ValueError(f"a table is of one machine; this record has {sorted(named)}: make a table for each")
    return named.pop()


def _named(environment: Row) -> str:
    cpus, threads = environment["num_cpus"], environment["num_threads"]
    threads = "a thread" if threads == 1 else f"{threads} threads"
    ranks = f" in each of {environment['ranks']} processes" if "ranks" in environment else ""
    versions = [f"{name} {value}" for name, value in environment.items() if name not in NOT_VERSIONS]
    return f"{environment['hardware']}, {cpus} CPUs, {threads}{ranks}; {', '.join(versions)}"


def goal(text: str, value: float, limit: float, *, show: Callable[[float], str], at_least: bool = False) -> str:
    """Say how a goal came out.

    Args:
        text: what was to be bounded.
        value: what it is.
        limit: the most that it may be, or the least.
        show: how both are printed.
        at_least: whether the limit is the least.

    Returns:
        "goal: TEXT at most LIMIT: met (VALUE)", or "missed by ...".
    """
    met = value >= limit if at_least else value <= limit
    told = "met" if met else f"missed by {show(abs(value - limit))}"
    return f"goal: {text} at {'least' if at_least else 'most'} {show(limit)}: {told} ({show(value)})"


def all_of(text: str, num_met: int, num_all: int) -> str:
    """Say of how many cases a goal holds that is meant for all."""
    told = "met" if num_met == num_all else f"missed in {num_all - num_met}"
    return f"goal: {text}: {told} ({num_met} of {num_all})"


def mib(num_bytes: float) -> str:
    """Print bytes."""
    return f"{num_bytes / 2**20:,.2f}"


def gib(num_bytes: float) -> str:
    """Print bytes that are many."""
    return f"{num_bytes / 2**30:,.2f}"


def ratio(value: float) -> str:
    """Print a ratio with three digits that mean something, or two behind the point."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def percent(value: float) -> str:
    """Print a share."""
    return f"{value:.2%}".replace("%", " %")


def change(value: float) -> str:
    """Print a difference in percent with its sign; what rounds to none has no sign."""
    told = f"{value:+.2%}".replace("%", " %")
    return told[1:] if float(told[:-2]) == 0 else told


def points(value: float) -> str:
    """Print a difference of two ratios, in percent points."""
    return f"{value * 100:.1f} points"


def cell(value: float | None, show: Callable[[float], str]) -> str:
    """Print a value that a row may lack."""
    return "-" if value is None else show(value)


def three(value: float) -> str:
    """Print a ratio that is compared with another in its third digit."""
    return f"{value:.3f}"


def yes(flag: bool | None) -> str:
    """Print a flag."""
    return "yes" if flag else "no"


def row_of(rows: Iterable[Row], **wanted: Any) -> Row:
    """Return the one row that has these values."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows of the record have {wanted}; the table needs one")
    return found[0]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, padded so that its source can be read too."""
    widths = [max(3, *(len(row[at]) for row in (header, *rows))) for at in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(_padded(line, widths)) + " |" for line in lines)


def _padded(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(cells, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
