"""Prints a saved plan or run as tables: what was chosen, the peak by category beside its prediction, the step time.

A memory snapshot of torch tells every block of the allocator and nothing of what was expected. Here the prediction
stands beside the measurement, category by category, so that a reader sees at once whether the numbers can be trusted.
"""

import os
import shlex
from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.table import Table

from packlight.budget import format_bytes
from packlight.ranks import Sharded, ShardingRow
from packlight.records import CATEGORIES, Choice, CurvePoint, Estimate, Measurement, Plan, Run
from packlight.report.pipeline import details
from packlight.serial import read_json


def read_record(path: str | os.PathLike[str]) -> Plan | Run:
    """Read a plan or a run from a JSON file.

    Returns:
        The record.

    Raises:
        ValueError: the file is neither.
    """
    return Plan.load(path) if read_json(path).get("kind") == "plan" else Run.load(path)


def show(record: Plan | Run, *, console: Console | None = None) -> None:
    """Print a plan or a run.

    Args:
        record: what `read_record` returned.
        console: where to print; None: standard output.
    """
    out = console or Console(emoji=False)
    run = record if isinstance(record, Run) else None
    plan = record if isinstance(record, Plan) else record.plan
    if run is not None:
        _print_plain(out, f"run of {shlex.join(run.script)}")
    if plan is not None:
        _print_plain(out, str(plan))
        for table in plan_tables(plan):
            out.print(table, markup=False)
    out.print(peaks(plan.estimate if plan else None, run.measurement if run else None), markup=False)
    if run is not None:
        out.print(run_facts(run), markup=False)


def plan_tables(plan: Plan) -> list[Table]:
    """Return what a plan chooses, what other budgets would give, and the ways to share states, as far as it says so."""
    told = [choices(plan)] if plan.pipeline is None else [*details(plan.pipeline, plan.choices)]
    told += [curve(plan.curve)] if plan.curve else []
    return told + ([shardings(plan.sharding)] if plan.sharding is not None else [])


def _print_plain(out: Console, line: str) -> None:
    """Print what a script's author wrote: brackets and colons are not rich's markup there."""
    out.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def summary(run: Run) -> str:
    """Say in one line what was expected of a run and what happened."""
    measured, estimate = run.measurement, run.estimate
    excess_bytes = measured.device_peak_bytes - (run.plan.budget_bytes if run.plan else measured.device_peak_bytes)
    warning = f"; ABOVE THE BUDGET by {format_bytes(excess_bytes)}" if excess_bytes > 0 else ""
    followed = f"{measured.num_measured_steps} of {measured.num_steps} steps"
    expected = f" (predicted {format_bytes(estimate.device_peak_bytes)})" if estimate else ""
    expected_step = f" (predicted {_seconds(estimate.step_seconds)})" if estimate else ""
    under_plan_bytes = measured.plan_peak_bytes
    if under_plan_bytes is not None and under_plan_bytes < measured.device_peak_bytes:  # other plans came before it
        expected = f", {format_bytes(under_plan_bytes)} under the final plan{expected}"
    return (
        f"packlight: peak {format_bytes(measured.device_peak_bytes)}{expected} in {followed}, "
        f"resident peak {format_bytes(measured.resident_peak_bytes)}, {_seconds(measured.step_seconds)} a step"
        f"{expected_step}{_moved(run)}{warning}"
    )


def _moved(run: Run) -> str:
    """Say how fast a tier was beside what the plan took it to be; nothing where none was used."""
    plan, measured = run.plan, run.measurement
    if plan is None or not measured.tier_peak_bytes:
        return ""
    was = _rates(measured.out_bytes_per_second, measured.in_bytes_per_second)
    taken = _rates(plan.out_bytes_per_second, plan.in_bytes_per_second)
    planned = f" (planned with {taken})" if plan.out_bytes_per_second else ""
    return f"; up to {format_bytes(measured.tier_peak_bytes)} on the {plan.tier}, moved there at {was}{planned}"


def _rates(out: float, back: float) -> str:
    return f"{format_bytes(out)}/s and back at {format_bytes(back)}/s"


def comparison(runs: dict[str, Run], losses: dict[str, float]) -> RenderableType:
    """Return one table of several runs of the same script.

    Args:
        runs: the runs by name.
        losses: their held-out losses by name.
    """
    table = Table(title="plain and planned", title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for title, values in _comparison_rows(runs, losses):
        table.add_row(title, *values)
    return table


def _comparison_rows(runs: dict[str, Run], losses: dict[str, float]) -> list[tuple[str, list[str]]]:
    measured = {name: run.measurement for name, run in runs.items()}
    return [
        ("budget", [format_bytes(run.plan.budget_bytes) if run.plan else "-" for run in runs.values()]),
        (
            "peak predicted",
            [format_bytes(run.estimate.device_peak_bytes) if run.estimate else "-" for run in runs.values()],
        ),
        ("peak measured", [format_bytes(each.device_peak_bytes) for each in measured.values()]),
        ("resident peak", [format_bytes(each.resident_peak_bytes) for each in measured.values()]),
        ("seconds per step", [_seconds(each.step_seconds) for each in measured.values()]),
        ("held-out loss", [f"{losses[name]:.4f}" for name in runs]),
    ]


def choices(plan: Plan) -> Table:
    """Return what is done with each block, group and state, and what the other choices would add."""
    table, every = Table(title="choices", title_justify="left"), (*plan.choices, *plan.kept)
    more = any(choice.options for choice in every)  # a record of an older packlight has none
    table.add_column("block or site", overflow="fold")
    table.add_column("choice")
    for title in ("holds for backward", *["held for"] * more, "adds"):
        table.add_column(title, justify="right")
    if more:
        table.add_column("others would add")
    for first, last, num_choices in _alike(every):
        name = first.group if num_choices == 1 else f"{first.group} ... {last.group} ({num_choices})"
        held, added = [_span(first.held_seconds, last.held_seconds)] * more, _span(first.seconds, last.seconds)
        table.add_row(name, first.choice, format_bytes(first.bytes), *held, added, *[_others(first)] * more)
    formats = sorted(set(plan.state_formats.values()))
    for state_format in formats:
        num_states = sum(chosen == state_format for chosen in plan.state_formats.values())
        table.add_row(f"optimiser states of {num_states} parameters", state_format, "", "")
    return table


def _span(first: float, last: float) -> str:
    """Say the times of neighbours, of the first and of the last."""
    return _seconds(first) if _seconds(first) == _seconds(last) else f"{_seconds(first)} ... {_seconds(last)}"


def _others(choice: Choice) -> str:
    """Say what the other choices would add, the cheapest first."""
    others = sorted((seconds, name) for name, seconds in choice.options.items() if name != choice.choice)
    return ", ".join(f"{name} {_seconds(seconds)}" for seconds, name in others)


def curve(points: tuple[CurvePoint, ...]) -> Table:
    """Return step time against budget, and what a GiB more would spare from there to the next point."""
    table = Table(title="step time against budget", title_justify="left")
    for title in ("budget", "predicted peak", "adds to a step", "slowdown", "one GiB more spares"):
        table.add_column(title, justify="right")
    fastest = points[-1].step_seconds
    for point, following in zip(points, [*points[1:], None], strict=True):
        spared = "-"
        if following is not None:
            num_gib = (following.budget_bytes - point.budget_bytes) / 2**30
            spared = _seconds((point.step_seconds - following.step_seconds) / num_gib) if num_gib else "-"
        sizes = format_bytes(point.budget_bytes), format_bytes(point.device_peak_bytes)
        table.add_row(*sizes, _seconds(point.step_seconds - fastest), f"{point.slowdown:.2f}x", spared)
    return table


def shardings(sharded: Sharded) -> Table:
    """Return what a rank holds, sends and takes under each way to share a model's states."""
    ranks, link = sharded.num_ranks, format_bytes(sharded.link_bytes_per_second)
    title = f"on each of {ranks} rank{'s' * (ranks != 1)}, which send{'s' * (ranks == 1)} {link}/s"
    caption = "* chosen; - not planned, since it cannot be faster or does not fit"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for row in sharded.rows:
        table.add_column(f"{row.name}{' *' * row.is_chosen}", justify="right", overflow="fold")
    for name, cells in _sharding_cells(sharded.rows):
        table.add_row(name, *cells)
    return table


def _sharding_cells(rows: Sequence[ShardingRow]) -> Iterator[tuple[str, list[str]]]:
    """Yield what is told of all shardings, one thing after the other, with the cell of each."""
    states = dict.fromkeys(name for row in rows for name in row.state_bytes)
    yield "parameters", [format_bytes(row.parameter_bytes) for row in rows]
    yield "gradients", [format_bytes(row.gradient_bytes) for row in rows]
    for name in states:
        yield f"states, {name}", [format_bytes(row.state_bytes[name]) for row in rows]
    yield "buffers", [format_bytes(row.buffer_bytes) for row in rows]
    if any(row.host_bytes for row in rows):
        yield "on its host, without states", [format_bytes(row.host_bytes) for row in rows]
    yield "peak as it is", [format_bytes(row.plain_peak_bytes) for row in rows]
    yield "sent", [format_bytes(row.sent_bytes) for row in rows]
    yield "waits", [_seconds(row.exposed_seconds) for row in rows]
    yield "planned step", [_seconds(row.step_seconds) for row in rows]


def _alike(choices: tuple[Choice, ...]) -> list[tuple[Choice, Choice, int]]:
    """Gather neighbours with the same choice, bytes and other choices."""
    gathered: list[tuple[Choice, Choice, int]] = []
    for choice in choices:
        if gathered and _kind(gathered[-1][0]) == _kind(choice):
            gathered[-1] = (gathered[-1][0], choice, gathered[-1][2] + 1)
        else:
            gathered.append((choice, choice, 1))
    return gathered


def _kind(choice: Choice) -> tuple[object, ...]:
    return choice.choice, choice.codec, choice.bytes, sorted(choice.options)


def peaks(estimate: Estimate | None, measured: Measurement | None) -> Table:
    """Return what a peak consists of, as predicted and as measured."""
    table = Table(title="bytes at the peak", title_justify="left")
    table.add_column("category")
    predicted = estimate.peak_by_category if estimate else {}
    found = measured.peak_by_category if measured else {}
    table.add_column("predicted", justify="right")
    table.add_column("measured", justify="right")
    for name in CATEGORIES:
        cells = [format_bytes(values[name]) if name in values else "-" for values in (predicted, found)]
        table.add_row(name.replace("_", " "), *cells)
    table.add_section()
    table.add_row(
        "all",
        format_bytes(estimate.device_peak_bytes) if estimate else "-",
        format_bytes(measured.device_peak_bytes) if measured else "-",
    )
    if estimate is not None and measured is not None and measured.plan_peak_bytes is not None:
        table.add_row("all, under the final plan", "", format_bytes(measured.plan_peak_bytes))
    table.add_row("where", estimate.peak_moment if estimate else "-", measured.peak_moment if measured else "-")
    return table


def run_facts(run: Run) -> Table:
    """Return what else is known of a run."""
    measured, estimate = run.measurement, run.estimate
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    predicted = f" (predicted {_seconds(estimate.step_seconds)})" if estimate else ""
    table.add_row("step time", f"{_seconds(measured.step_seconds)}{predicted}")
    table.add_row("steps", f"{measured.num_steps}, of which {measured.num_measured_steps} were measured for the peak")
    table.add_row("resident peak", format_bytes(measured.resident_peak_bytes))
    if measured.reserved_peak_bytes is not None:
        table.add_row("reserved peak", format_bytes(measured.reserved_peak_bytes))
    table.add_row("optimiser states", format_bytes(measured.state_bytes))
    if moved := _moved(run).removeprefix("; "):
        table.add_row("tier", moved)
    ends = [values for values in (measured.losses.get("first"), measured.losses.get("last")) if values]
    if ends:
        table.add_row("loss", f"{ends[0][0]:.6g} at first, {ends[-1][-1]:.6g} at last")
    table.add_row("environment", ", ".join(f"{key} {value}" for key, value in run.environment.items()))
    return table


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g} s"
