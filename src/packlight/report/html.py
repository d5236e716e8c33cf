"""Shows a saved plan or run as one page: where the memory goes over a step, predicted beside measured, and why.

The tables of `text.py` say how high a peak stands and what was chosen. Which layer holds the bytes, since when and
until when, and which line of code made them, is a drawing with some hundred storages in it. The page has both: each
drawing, and each table of the terminal, from the same record, so that no figure can stand on it that the record lacks.
"""

import os
import shlex
from collections.abc import Sequence

from packlight.budget import format_bytes
from packlight.memory import Held, Memory, Phase
from packlight.records import Plan, Run
from packlight.report import drawings, frame, lanes, text

MOST_ROWS = 60
"""So many of the storages at a peak are told one by one."""


def write(record: Plan | Run, path: str | os.PathLike[str]) -> None:
    """Write the page of a record; it appears whole or not at all, and fetches nothing.

    Args:
        record: what `text.read_record` returned.
        path: of the page.
    """
    frame.write_page(path, title=title_of(record), body=body_of(record))


def title_of(record: Plan | Run) -> str:
    """Say what a page is of."""
    if isinstance(record, Run):
        return f"run of {shlex.join(record.script)}"
    return f"plan for {format_bytes(record.budget_bytes)} on {record.hardware or record.device}"


def body_of(record: Plan | Run) -> str:
    """Return all of a page between its frame."""
    run = record if isinstance(record, Run) else None
    plan = record if isinstance(record, Plan) else record.plan
    parts = [f"<h1>{frame.escaped(title_of(record))}</h1>", _headline(plan, run)]
    if plan is not None:
        parts.append(f"<pre>{frame.escaped(plan)}</pre>")
    parts += [_over_the_step(plan, run), _moved(plan), _at_the_peak(plan, run), _largest(plan, run)]
    parts += [_chosen(plan)] if plan is not None else []
    parts += [_run(run)] if run is not None else []
    return "\n".join(part for part in parts if part)


def _memories(plan: Plan | None, run: Run | None) -> list[tuple[str, Memory]]:
    """Return what is known of a step, each with its name."""
    found = [("predicted", plan.predicted if plan else None), ("measured", run.measured if run else None)]
    return [(name, memory) for name, memory in found if memory is not None]


def _headline(plan: Plan | None, run: Run | None) -> str:
    """Return the numbers that a reader looks for first."""
    cards: list[tuple[str, str]] = []
    if plan is not None:
        estimate = plan.estimate
        cards += [
            ("budget", format_bytes(plan.budget_bytes)),
            ("predicted peak", format_bytes(estimate.device_peak_bytes)),
        ]
    if run is not None:
        cards.append(("measured peak", format_bytes(run.measurement.device_peak_bytes)))
    if plan is not None:
        cards += [
            ("peak if nothing is changed", format_bytes(plan.estimate.plain_peak_bytes)),
            ("predicted slowdown", f"{plan.estimate.slowdown:.2f}x"),
            ("predicted step", f"{plan.estimate.step_seconds:.3g} s"),
        ]
    if run is not None and run.measurement.step_seconds is not None:
        cards.append(("measured step", f"{run.measurement.step_seconds:.3g} s"))
    told = "".join(f"<div><dt>{frame.escaped(name)}</dt><dd>{frame.escaped(value)}</dd></div>" for name, value in cards)
    return f'<dl class="cards">{told}</dl>'


def _over_the_step(plan: Plan | None, run: Run | None) -> str:
    memories = _memories(plan, run)
    if not memories:
        drawn = " What its ranks do, and when, packlight pipeline --html draws." if plan and plan.pipeline else ""
        return f"<h2>Memory over the step</h2><p>The record does not say what lives over the step.{drawn}</p>"
    budget_bytes = plan.budget_bytes if plan else None
    highest_bytes = max(memory.peak_bytes for _, memory in memories)
    shown = [_memory(name, each, budget_bytes=budget_bytes, highest_bytes=highest_bytes) for name, each in memories]
    note = (
        "What tensors occupy on the device, stacked by category; the parts of the step are shaded. Drag to zoom, "
        "double-click to see all; the pointer tells the largest storages that live there."
    )
    legend = [(drawings.named(name), colour) for name, colour in drawings.COLOURS.items()]
    legend += [(f"budget {format_bytes(budget_bytes)} (dashed)", drawings.BUDGET_COLOUR)] if budget_bytes else []
    return (
        f'<h2>Memory over the step</h2><p class="soft">{note}</p>{_keys(legend, is_peak_marked=True)}'
        f'<div class="beside">{"".join(shown)}</div>'
    )


def _keys(legend: Sequence[tuple[str, str]], *, is_peak_marked: bool = False) -> str:
    """Return what colours mean, and the mark of a peak, where there is one."""
    keys = [f'<li><span style="background:{colour}"></span>{frame.escaped(name)}</li>' for name, colour in legend]
    keys += ["<li>\u25c6 the peak</li>"] if is_peak_marked else []
    return f'<ul class="keys">{"".join(keys)}</ul>'


def _memory(name: str, memory: Memory, *, budget_bytes: int | None, highest_bytes: int) -> str:
    figure = drawings.memory_drawing(memory, budget_bytes=budget_bytes, highest_bytes=highest_bytes)
    step = f", step {memory.step}" if memory.step else ""
    said = f"{name} bytes over the step; the peak of {format_bytes(memory.peak_bytes)} is in {_moment(memory)}"
    drawing = frame.drawn(figure, f"memory-{name}", described=said)
    parts = [("whole step", 0.0, drawings.ends(memory))]
    parts += [(phase.name, phase.start, max(phase.end, phase.start + 1)) for phase in _longest(memory)]
    buttons = _buttons(f"memory-{name}", parts)
    table = frame.tabled(f"{name}: most bytes in each part of the step", *_phase_rows(memory), numbers=(1, 2))
    head = f"{name}{step}: peak {format_bytes(memory.peak_bytes)} in {_moment(memory)}"
    return (
        f"<section><h3>{frame.escaped(head)}</h3><p>{buttons}</p>{drawing}<details><summary>as a table</summary>{table}"
        "</details></section>"
    )


def _buttons(drawing: str, parts: Sequence[tuple[str, float, float]]) -> str:
    """Return buttons that show a part of a drawing: each with its name, and where it begins and ends."""
    return "".join(
        f'<button type="button" data-drawing="{drawing}" data-start="{start}" data-end="{end}">'
        f"{frame.escaped(part)}</button>"
        for part, start, end in parts
    )


def _moved(plan: Plan | None) -> str:
    """Return when a plan's groups go to its tier and come back; nothing where none does."""
    found = plan.predicted.lanes if plan is not None and plan.predicted is not None else None
    if plan is None or found is None:
        return ""
    note = (
        "What is copied when over one forward and backward, as it is predicted; copies that compute waits for slow the "
        "step down, others do not. Drag to zoom, double-click to see all; the pointer tells groups, bytes and seconds."
    )
    parts = [("whole step", 0.0, found.end), ("forward", 0.0, found.forward_end)]
    parts.append(("backward", found.forward_end, found.backward_end))
    said = f"predicted seconds of compute, and of copies to the {plan.tier} and back; {lanes.summed(found)}"
    drawing = frame.drawn(lanes.copies_drawing(found), "copies", described=said)
    table = frame.tabled("predicted: copies and compute over the step", *lanes.rows(found), numbers=(2, 3, 4, 5))
    return (
        f'<h2>Copies to the {frame.escaped(plan.tier)} and back</h2><p class="soft">{note}</p>'
        f"<p>{lanes.summed(found)}</p>{_keys(lanes.legend(found))}<p>{_buttons('copies', parts)}</p>"
        f"{drawing}<details><summary>as a table</summary>{table}</details>"
    )


def _moment(memory: Memory) -> str:
    return memory.phase_at(memory.peak) or "no phase"


def _longest(memory: Memory) -> Sequence[Phase]:
    """Return the phases, each name once: of several microbatches' the longest."""
    by_name: dict[str, Phase] = {}
    for phase in memory.phases:
        before = by_name.get(phase.name)
        if before is None or phase.end - phase.start > before.end - before.start:
            by_name[phase.name] = phase
    return list(by_name.values())


def _phase_rows(memory: Memory) -> tuple[list[str], list[list[str]]]:
    """Return for each phase its highest and lowest event, and what lives at the highest."""
    lines = memory.by_category()
    total = [sum(each) for each in zip(*lines.values(), strict=True)]
    rows = []
    for phase in memory.phases:
        span = range(phase.start, phase.end)
        if not span:
            continue
        top = max(span, key=total.__getitem__)
        divided = [
            f"{drawings.named(name)} {format_bytes(size)}"
            for name, size in sorted(memory.at(top).items(), key=lambda each: -each[1])
            if size
        ]
        least = format_bytes(min(total[at] for at in span))
        rows.append([phase.name, format_bytes(total[top]), least, ", ".join(divided)])
    return ["part", "most", "least", "of what, where it is most"], rows


def _at_the_peak(plan: Plan | None, run: Run | None) -> str:
    predicted = dict(plan.estimate.peak_by_category) if plan else {}
    measured = dict(run.measurement.peak_by_category) if run else {}
    table = frame.as_html(text.peaks(plan.estimate if plan else None, run.measurement if run else None))
    if not any(predicted.values()) and not any(measured.values()):
        return f"<h2>At the peak</h2>{table}"
    figure = drawings.peak_drawing(predicted, measured)
    said = "Bytes at the peak by category, predicted (plain) beside measured (hatched)."
    drawing = frame.drawn(figure, "peak", described=said)
    return (
        f'<h2>At the peak</h2><p class="soft">{said}</p>'
        f'<div class="beside"><div>{drawing}</div><div>{table}</div></div>'
    )


def _largest(plan: Plan | None, run: Run | None) -> str:
    tables = []
    for name, memory in _memories(plan, run):
        alive = memory.alive(memory.peak)
        rows = [_storage_row(memory, each) for each in alive[:MOST_ROWS]]
        told_bytes = sum(each.num_bytes for each in alive[:MOST_ROWS])
        title = f"{name}: {len(rows)} storages, {format_bytes(told_bytes)} of {format_bytes(memory.peak_bytes)}"
        columns = ["bytes", "category", "site", "code", "lives"]
        tables.append(frame.tabled(title, columns, rows, numbers=(0,)))
    return f'<h2>Largest storages at the peak</h2><div class="beside">{"".join(tables)}</div>' if tables else ""


def _storage_row(memory: Memory, each: Held) -> list[str]:
    born, last = memory.phase_at(each.born), memory.phase_at(each.died - 1)
    lives = "the whole step" if each.born == 0 and each.died >= len(memory.events) else f"{born} to {last}"
    lives = f"in {born}" if born == last and lives != "the whole step" else lives
    return [format_bytes(each.num_bytes), drawings.named(each.category), each.site, each.code, lives]


def _chosen(plan: Plan) -> str:
    """Return what was chosen and why, other budgets, and the ways to share states."""
    told = "".join(map(frame.as_html, text.plan_tables(plan)))
    why = (
        "What each block or storage holds for backward, for how long, what its choice adds to a step, and what the "
        "other choices would have added."
    )
    drawing = ""
    if plan.curve:
        said = "Predicted seconds of a step against the budget."
        drawing = frame.drawn(drawings.curve_drawing(plan.curve, plan), "curve", described=said)
        drawing = f"<h2>Step time against budget</h2>{drawing}"
    return f'<h2>What was chosen, and why</h2><p class="soft">{why}</p>{told}{drawing}'


def _run(run: Run) -> str:
    """Return the run's other facts, its losses and its environment."""
    facts, losses = frame.as_html(text.run_facts(run)), run.measurement.losses
    rows = [[name, ", ".join(f"{loss:.6g}" for loss in values)] for name, values in losses.items() if values]
    told = frame.tabled("losses", ["", ""], rows) if rows else ""
    environment = [[str(name), str(value)] for name, value in run.environment.items()]
    return f"<h2>The run</h2>{facts}{told}<h2>Environment</h2>{frame.tabled('environment', ['', ''], environment)}"
