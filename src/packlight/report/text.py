"""Prints a saved plan or run as tables: what was chosen, the peak by category beside its prediction, the step time.

A memory snapshot of torch tells every block of the allocator and nothing of what was expected. Here the prediction
stands beside the measurement, category by category, so that a reader sees at once whether the numbers can be trusted.
"""

import os
import re
import shlex
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.table import Table

from packlight.budget import format_bytes, format_seconds
from packlight.measurement import RESIDENT, Measurement
from packlight.ranks import Sharded, ShardingRow
from packlight.records import CATEGORIES, Choice, CurvePoint, Estimate, Plan, Run
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


def show(record: Plan | Run, *, console: Console | None = None, is_short: bool = False) -> None:
    """Print a plan or a run.

    Args:
        record: what `read_record` returned.
        console: where to print; None: standard output.
        is_short: of a plan's choices, print those that change something.
    """
    out = console or Console(emoji=False)
    run = record if isinstance(record, Run) else None
    plan = record if isinstance(record, Plan) else record.plan
    if run is not None:
        _print_plain(out, f"run of {shlex.join(run.script)}")
    if plan is not None:
        _print_plain(out, str(plan))
        for table in plan_tables(plan, is_short=is_short):
            out.print(table, markup=False)
    out.print(peaks(plan.estimate if plan else None, run.measurement if run else None), markup=False)
    if run is not None:
        out.print(run_facts(run), markup=False)


def plan_tables(plan: Plan, *, is_short: bool = False) -> list[Table]:
    """Return what a plan chooses, what other budgets would give, and the ways to share states, as far as it says so."""
    told = [*details(plan.pipeline, plan.choices)] if plan.pipeline is not None else _chosen(plan, is_short=is_short)
    told += [curve(plan.curve)] if plan.curve else []
    return told + ([shardings(plan.sharding)] if plan.sharding is not None else [])


def _chosen(plan: Plan, *, is_short: bool) -> list[Table]:
    every = [choices(plan, is_short=is_short)] if plan.choices or plan.kept else []
    if is_short:
        return every if any(choice.choice != "keep" for choice in plan.choices) else []
    return every + ([states(plan)] if plan.state_formats else [])


def _print_plain(out: Console, line: str) -> None:
    """Print what a script's author wrote: brackets and colons are not rich's markup there."""
    out.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def summary(run: Run) -> str:
    """Say in one line what was expected of a run and what happened."""
    measured = _beside(run)
    excess = measured.told_excess(run.plan.budget_bytes if run.plan else None)
    followed = f"{measured.num_measured_steps} of {measured.num_steps} steps"
    return (
        f"packlight: peak {measured.told_peak()} in {followed}, resident peak {measured.told_resident()}, "
        f"{measured.told_step(' a step')}{_moved(run)}{excess}"
    )


def _beside(run: Run) -> Measurement:
    """Return a run's measurement with what was expected, which a record of before does not have there."""
    measured, estimate = run.measurement, run.estimate
    if estimate is None or measured.predicted_peak_bytes is not None:
        return measured
    expected = {"predicted_peak_bytes": estimate.device_peak_bytes, "predicted_step_seconds": estimate.step_seconds}
    return replace(measured, **expected)  # type: ignore[arg-type]


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
    is_below = any(run.measurement.is_resident_below for run in runs.values())
    caption = f"resident: {RESIDENT}" if is_below else None
    table = Table(title="plain and planned", title_justify="left", caption=caption, caption_justify="left")
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
        ("seconds per step", [format_seconds(each.step_seconds) for each in measured.values()]),
        ("held-out loss", [f"{losses[name]:.4f}" for name in runs]),
    ]


def choices(plan: Plan, *, is_short: bool = False) -> Table:
    """Return what is done with each block and group, and what the other choices would add.

    Args:
        plan: the plan.
        is_short: leave out what is kept, and say of how many that is.
    """
    every = (*plan.choices, *plan.kept)
    shown = [choice for choice in every if choice.choice != "keep" or not is_short]
    num_left = len(every) - len(shown)
    caption = f"{num_left} other{'s' * (num_left != 1)} kept; --all lists them" if num_left else None
    table = Table(title="choices", title_justify="left", caption=caption, caption_justify="left")
    more = any(choice.options for choice in every)  # a record of an older packlight has none
    others = any(map(_others, shown))
    table.add_column("block or site", overflow="fold")
    table.add_column("choice")
    for title in ("each holds", *["held for"] * more, "each adds"):
        table.add_column(title, justify="right")
    if others:
        table.add_column("others would add")
    of_name = {choice.group: choice for choice in shown}
    for name, alike in gathered({name: _kind(choice) for name, choice in of_name.items()}):
        same = [of_name[each] for each in alike]
        held = [_span(choice.held_seconds for choice in same)] * more
        added = _span(choice.seconds for choice in same)
        table.add_row(name, same[0].choice, format_bytes(same[0].bytes), *held, added, *[_others(same[0])] * others)
    return table


def states(plan: Plan) -> Table:
    """Return which parameters have their optimiser's state in which format, those of equal layers in one row."""
    table = Table(title="optimiser states", title_justify="left")
    table.add_column("of parameters", overflow="fold")
    table.add_column("format")
    known = any(plan.num_elements.values())  # a record of an older packlight does not say
    if known:
        table.add_column("elements of each", justify="right")
    kinds = {name: (chosen, plan.num_elements.get(name, 0)) for name, chosen in plan.state_formats.items()}
    for name, alike in gathered(kinds):
        chosen, num_elements = kinds[alike[0]]
        table.add_row(name, chosen, *[f"{num_elements:,}"] * known)
    return table


def gathered(kinds: Mapping[str, Hashable]) -> list[tuple[str, list[str]]]:
    """Gather names of one kind that differ in a number alone: equal layers.

    Args:
        kinds: of each name; what stands after a colon in it is no layer's number.

    Returns:
        For each row its name, in which numbers are ranges, and the names in it.

    >>> gathered({"layers.0.up:1": 1, "layers.1.up:1": 1, "layers.2.up:1": 2, "layers.3.up:1": 1})
    [('layers.0-1,3.up:1', ['layers.0.up:1', 'layers.1.up:1', 'layers.3.up:1']), ('layers.2.up:1', ['layers.2.up:1'])]
    """
    rows = [(_cut_at_numbers(name), kind, [name]) for name, kind in kinds.items()]
    for at in reversed(range(1, max((len(parts) for parts, _, _ in rows), default=0), 2)):
        found: dict[Hashable, list[tuple[list[str], Hashable, list[str]]]] = {}
        for number, (parts, kind, names) in enumerate(rows):
            same = (*parts[:at], "", *parts[at + 1 :], kind) if at < len(parts) else number
            found.setdefault(same, []).append((parts, kind, names))
        rows = [_joined(alike, at) for alike in found.values()]
    return [("".join(parts), names) for parts, _, names in rows]


def _cut_at_numbers(name: str) -> list[str]:
    """Cut a name before and after each number of its path, which stand at odd places then."""
    path, colon, rest = name.partition(":")
    *parts, last = re.split(r"(\d+)", path)
    return [*parts, last + colon + rest]


def _joined(alike: list[tuple[list[str], Hashable, list[str]]], at: int) -> tuple[list[str], Hashable, list[str]]:
    parts, kind, _ = alike[0]
    names = [name for _, _, names in alike for name in names]
    if len(alike) == 1:
        return parts, kind, names
    numbers = _ranges(sorted({int(parts[at]) for parts, _, _ in alike}))
    return [*parts[:at], numbers, *parts[at + 1 :]], kind, names


def _ranges(numbers: list[int]) -> str:
    """Write growing numbers as ranges."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][-1] + 1:
            ends[-1] = [ends[-1][0], number]
        else:
            ends.append([number])
    return ",".join("-".join(map(str, each)) for each in ends)


def _span(seconds: Iterable[float]) -> str:
    """Say the times of equal layers, from the shortest to the longest."""
    shortest, *_, longest = sorted([*seconds] * 2)
    ends = format_seconds(shortest), format_seconds(longest)
    return ends[0] if ends[0] == ends[1] else f"{ends[0].removesuffix(' s')} to {ends[1]}"


def _others(choice: Choice) -> str:
    """Say what the other choices would add, the cheapest first; keeping adds nothing."""
    others = sorted((seconds, name) for name, seconds in choice.options.items() if name not in ("keep", choice.choice))
    return ", ".join(f"{name} {format_seconds(seconds)}" for seconds, name in others)


def curve(points: tuple[CurvePoint, ...]) -> Table:
    """Return step time against budget, and what a GiB more would spare from there to the next point."""
    is_faster = any(round(point.slowdown, 2) < 1 for point in points)
    caption = "below 1.00x: states in few bits are stepped faster, or the noise of timing" if is_faster else None
    table = Table(title="step time against budget", title_justify="left", caption=caption, caption_justify="left")
    for title in ("budget", "predicted peak", "adds to a step", "slowdown", "one GiB more spares"):
        table.add_column(title, justify="right")
    fastest = points[-1].step_seconds
    for point, following in zip(points, [*points[1:], None], strict=True):
        spared = "-"
        if following is not None:
            num_gib = (following.budget_bytes - point.budget_bytes) / 2**30
            spared = format_seconds((point.step_seconds - following.step_seconds) / num_gib) if num_gib else "-"
        sizes = format_bytes(point.budget_bytes), format_bytes(point.device_peak_bytes)
        table.add_row(*sizes, format_seconds(point.step_seconds - fastest), f"{point.slowdown:.2f}x", spared)
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
    yield "waits", [format_seconds(row.exposed_seconds) for row in rows]
    yield "planned step", [format_seconds(row.step_seconds) for row in rows]


def _kind(choice: Choice) -> tuple[object, ...]:
    return choice.choice, choice.codec, choice.bytes, tuple(sorted(choice.options))


def peaks(estimate: Estimate | None, measured: Measurement | None) -> Table:
    """Return what a peak consists of, as predicted and as measured, as far as there is either."""
    table = Table(title="bytes at the peak", title_justify="left")
    table.add_column("category")
    sides: list[Estimate | Measurement] = [each for each in (estimate, measured) if each is not None]
    for side in sides:
        table.add_column("predicted" if side is estimate else "measured", justify="right")
    for name in CATEGORIES:
        cells = [format_bytes(each.peak_by_category[name]) if name in each.peak_by_category else "-" for each in sides]
        if set(cells) != {"-"}:
            table.add_row(name.replace("_", " "), *cells)
    table.add_section()
    table.add_row("all", *[format_bytes(each.device_peak_bytes) for each in sides])
    if estimate is not None and measured is not None and measured.plan_peak_bytes is not None:
        table.add_row("all, under the final plan", "", format_bytes(measured.plan_peak_bytes))
    table.add_row("where", *[each.peak_moment or "-" for each in sides])
    return table


def run_facts(run: Run) -> Table:
    """Return what else is known of a run."""
    measured = _beside(run)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("step time", measured.told_step())
    table.add_row("steps", f"{measured.num_steps}, of which {measured.num_measured_steps} were measured for the peak")
    table.add_row("resident peak", measured.told_resident())
    if measured.reserved_peak_bytes is not None:
        table.add_row("reserved peak", format_bytes(measured.reserved_peak_bytes))
    table.add_row("optimiser states", format_bytes(measured.state_bytes))
    if moved := _moved(run).removeprefix("; "):
        table.add_row("tier", moved)
    if measured.told_loss():
        table.add_row("loss", measured.told_loss())
    for note in measured.notes:
        table.add_row("note", note)
    table.add_row("environment", ", ".join(f"{key} {value}" for key, value in run.environment.items()))
    return table
