"""Shows a pipeline's schedule: the candidates as a table, and the choice as a page with a timeline of each rank.

A schedule is a list of a few hundred actions for each rank; what is wrong with one shows in a drawing at once. Compute,
copies to the host and copies back have a lane each, so that one sees what copies hide behind.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from packlight.budget import format_bytes
from packlight.records import Choice, Plan
from packlight.report import frame
from packlight.report.lanes import LANES, Drawn, Look, lanes_drawing
from packlight.schedules import Bar, Pipeline, PipelineRow

LOOKS = {
    "F": Look("forward", "#4c78a8"),
    "I": Look("gradient of the input", "#f58518"),
    "W": Look("gradient of the weights", "#54a24b"),
    "B": Look("both gradients", "#e45756"),
    "OFFLOAD": Look("to the host", "#9d9da1"),
    "RELOAD": Look("back", "#b279a2"),
}
"""By action; told apart by people who confuse red and green too (Tableau's ten, in its own order)."""
MAX_BARS = 20000
"""A browser draws so many in a second or two; of a longer step the beginning is drawn."""


def candidates(rows: Sequence[PipelineRow]) -> RenderableType:
    """Return a table of the schedules that were weighed.

    Args:
        rows: in the order in which they are shown.
    """
    table = Table(title="schedules", title_justify="left")
    table.add_column("schedule", no_wrap=True)
    for title in ("peak of a rank", "on its host", "bubble", "step", "tokens/s"):
        table.add_column(title, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            row.name,
            format_bytes(row.peak_bytes),
            format_bytes(row.host_bytes) if row.host_bytes else "-",
            f"{row.bubble:.1%}",
            f"{row.step_seconds:.4g} s",
            f"{row.tokens_per_second:,.0f}",
            "chosen" if row.is_chosen else "",
            style="bold" if row.is_chosen else None,
        )
    return table


def show(plan: Plan, rows: Sequence[PipelineRow], *, console: Console | None = None) -> None:
    """Print a pipeline's plan, and what it was chosen among.

    Args:
        plan: the choice.
        rows: the candidates.
        console: where to print; None: standard output.
    """
    out = console or Console(emoji=False)
    out.print(candidates(rows), markup=False)
    out.print(str(plan), highlight=False, markup=False, soft_wrap=True)


def details(pipeline: Pipeline, choices: Sequence[Choice]) -> tuple[Table, Table]:
    """Return tables of what stages hold and of what ranks take at most.

    Args:
        pipeline: of a plan.
        choices: the plan's, one for each stage.
    """
    stages = Table(title="stages", title_justify="left")
    stages.add_column("stages")
    stages.add_column("what a microbatch holds")
    stages.add_column("bytes", justify="right")
    for first, last, each in _runs([(choice.choice, choice.bytes) for choice in choices]):
        moved = "goes to the tier" if each[0] == "offload" else "stays"
        stages.add_row(_from_to(first, last), moved, format_bytes(each[1]))
    ranks = Table(title="ranks", title_justify="left")
    ranks.add_column("ranks")
    for title in ("most on the device", "on the tier"):
        ranks.add_column(title, justify="right")
    for first, last, each in _runs(list(zip(pipeline.peaks_bytes, pipeline.hosts_bytes, strict=True))):
        ranks.add_row(_from_to(first, last), format_bytes(each[0]), format_bytes(each[1]) if each[1] else "-")
    return stages, ranks


def _runs(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """Gather equal neighbours: place of the first, of the last, and the value."""
    found = list[tuple[int, int, Any]]()
    for place, value in enumerate(values):
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], place, value)
        else:
            found.append((place, place, value))
    return found


def _from_to(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def write_page(path: Path, plan: Plan, bars: Sequence[Bar]) -> None:
    """Write a page with a timeline: for each rank compute, copies to the host, and copies back.

    Args:
        path: of the page, which holds all that it needs (5 MB of it draws).
        plan: the choice.
        bars: what is drawn.
    """
    drawn, note = list(bars), ""
    if len(drawn) > MAX_BARS:
        drawn = sorted(drawn, key=lambda each: each.start)[:MAX_BARS]
        note = f"; the first {drawn[-1].start:.3g} s of {max(each.end for each in bars):.3g}"
    used = {_lane(bar.rank, bar.lane) for bar in drawn}
    num_ranks = 1 + max((bar.rank for bar in drawn), default=0)
    order = [lane for rank in range(num_ranks) for each in LANES if (lane := _lane(rank, each)) in used]
    figure = lanes_drawing([_drawn(bar) for bar in drawn], LOOKS, order)
    figure.update_layout(
        height=200 + 22 * len(order),
        margin={"l": 70, "r": 10, "t": 30, "b": 160},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    title = f"{plan.pipeline.told(plan.tier, plan.folder) if plan.pipeline else plan.device}{note}"
    drawing = frame.drawn(
        figure, "pipeline", described="What each rank computes and copies, over the seconds of a step."
    )
    frame.write_page(path, title=title, body=f"<p>{frame.escaped(title)}</p>\n{drawing}")


def _drawn(bar: Bar) -> Drawn:
    what = f"{LOOKS[bar.kind].name}: stage {bar.stage}, microbatch {bar.microbatch}"
    told = f"{what}<br>{bar.start:.4g} to {bar.end:.4g} s"
    return Drawn(_lane(bar.rank, bar.lane), bar.kind, bar.start, bar.end, told)


def _lane(rank: int, lane: str) -> str:
    return f"rank {rank}" if lane == "compute" else f"{lane} {rank}"
