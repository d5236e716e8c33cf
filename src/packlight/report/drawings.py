"""Draws what lives over a step, what a peak consists of, and what other budgets would give.

A list of intervals says nothing at a glance; stacked by category over the step they show where the peak stands, which
part of it a plan could take away, and whether the measured step went as predicted. plotly draws: one can zoom into any
part, and what the pointer is over is told by its largest storages, with their sites and lines of code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from packlight.budget import format_bytes
from packlight.memory import Held, Memory
from packlight.records import CATEGORIES, CurvePoint, Plan
from packlight.report.frame import escaped

COLOURS = {
    "parameters": "#0072b2",
    "gradients": "#e69f00",
    "optimizer_states": "#009e73",
    "activations": "#56b4e9",
    "temporaries": "#d55e00",
    "other": "#999999",
}
"""Told apart by people who confuse colours, too. Source: Okabe and Ito, "Color Universal Design" (2008)."""
BUDGET_COLOUR = "#cc79a7"
NUM_TOLD = 6
"""So many of the largest storages are told of an event."""
LABEL_SHARE = 0.12
"""Phases that take a smaller share of a drawing's width have no room for their names."""


def units(num_bytes: int) -> tuple[float, str]:
    """Return the unit that a drawing of so many bytes counts in, and its name."""
    for name, size in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if num_bytes >= size:
            return size, name
    return 1.0, "B"


def named(category: str) -> str:
    """Return a category as a reader knows it."""
    return category.replace("_", " ")


def ends(memory: Memory) -> float:
    """Return where a drawing ends: what lives at the last event is drawn, too, however short its phase is."""
    last = memory.phases[-1] if memory.phases else None
    return len(memory.events) + (0.04 * len(memory.events) if last and last.end - last.start < 2 else 0)


def memory_drawing(memory: Memory, *, budget_bytes: int | None, highest_bytes: int) -> Any:
    """Draw what lives over a step.

    Args:
        memory: of the step.
        budget_bytes: what is allowed, if that is known.
        highest_bytes: what the drawing has to have room for.

    Returns:
        The figure.
    """
    from plotly.graph_objects import Figure, Scatter

    size, unit = units(highest_bytes)
    places = [*range(len(memory.events)), ends(memory)]
    figure, lines = Figure(), memory.by_category()
    total = [0] * len(memory.events)
    for name in CATEGORIES:
        values = lines.get(name, [0] * len(memory.events))
        total = [before + each for before, each in zip(total, values, strict=True)]
        if any(values):
            figure.add_trace(_area(named(name), COLOURS[name], places, [each / size for each in values]))
    told = [_told(memory, event) for event in range(len(memory.events))]
    figure.add_trace(
        Scatter(
            x=places,
            y=_rounded([each / size for each in [*total, total[-1]]]),
            customdata=[*told, told[-1]],
            hovertemplate="%{customdata}<extra></extra>",
            line={"width": 0, "shape": "hv"},
            name="all",
            showlegend=False,
        )
    )
    _mark_phases(figure, memory)
    _mark_levels(figure, memory, budget_bytes=budget_bytes, size=size)
    top = max(highest_bytes, budget_bytes if budget_bytes and budget_bytes < 1.5 * highest_bytes else 0)
    figure.update_layout(
        height=380,
        hovermode="x",
        margin={"l": 56, "r": 12, "t": 30, "b": 46},
        xaxis={"title": "events: storages are born or die", "range": [0, places[-1]]},
        yaxis={"title": unit, "range": [0, 1.12 * top / size]},
        showlegend=False,
        hoverlabel={"align": "left"},
    )
    return figure


def _area(name: str, colour: str, places: Sequence[float], values: Sequence[float]) -> Any:
    from plotly.graph_objects import Scatter

    return Scatter(
        x=places,
        y=_rounded([*values, values[-1]]),
        name=name,
        stackgroup="all",
        line={"width": 0, "shape": "hv", "color": colour},
        fillcolor=colour,
        hoverinfo="skip",
    )


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _told(memory: Memory, event: int) -> str:
    """Say what lives at an event, as a drawing's label."""
    divided = memory.at(event)
    largest = memory.alive(event)[:NUM_TOLD]
    lines = [f"<b>{format_bytes(sum(divided.values()))}</b> in {escaped(memory.phase_at(event) or 'no phase')}"]
    lines += [f"{named(name)} {format_bytes(divided[name])}" for name in CATEGORIES if divided.get(name)]
    return "<br>".join([*lines, "<i>the largest:</i>", *(escaped(_line(each)) for each in largest)])


def _line(each: Held) -> str:
    where = ", ".join(part for part in (_cut(each.site), _cut(each.code)) if part)
    return f"{format_bytes(each.num_bytes)} {where or named(each.category)}"


def _cut(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:20]}...{text[-25:]}"


def _mark_phases(figure: Any, memory: Memory) -> None:
    width = ends(memory)
    for number, phase in enumerate(memory.phases):
        end = width if phase.end >= len(memory.events) else phase.end
        has_room = end - phase.start >= LABEL_SHARE * width
        figure.add_vrect(
            x0=phase.start,
            x1=end,
            fillcolor="#808080",
            opacity=0.14 if number % 2 else 0.04,
            layer="below",
            line_width=0,
            annotation_text=phase.name if has_room else "",
            annotation_position="top left",
        )


def _mark_levels(figure: Any, memory: Memory, *, budget_bytes: int | None, size: float) -> None:
    from plotly.graph_objects import Scatter

    width = ends(memory)
    figure.add_trace(
        Scatter(
            x=[memory.peak],
            y=[round(memory.peak_bytes / size, 4)],
            mode="markers",
            marker={"symbol": "diamond", "size": 11, "color": "#000000", "line": {"width": 2, "color": "#ffffff"}},
            name=f"peak {format_bytes(memory.peak_bytes)}",
            hoverinfo="skip",
        )
    )
    if budget_bytes:
        figure.add_trace(
            Scatter(
                x=[0, width],
                y=[budget_bytes / size] * 2,
                mode="lines",
                line={"dash": "dash", "width": 2, "color": BUDGET_COLOUR},
                name=f"budget {format_bytes(budget_bytes)}",
                hoverinfo="skip",
            )
        )


def peak_drawing(predicted: Mapping[str, int], measured: Mapping[str, int]) -> Any:
    """Draw what a peak consists of, predicted beside measured."""
    from plotly.graph_objects import Bar, Figure

    size, unit = units(max([*predicted.values(), *measured.values(), 1]))
    names = [name for name in CATEGORIES if predicted.get(name) or measured.get(name)]
    figure = Figure()
    for title, values, pattern in (("predicted", predicted, ""), ("measured", measured, "/")):
        if values:
            figure.add_trace(
                Bar(
                    y=[named(name) for name in names],
                    x=_rounded([values.get(name, 0) / size for name in names]),
                    customdata=[format_bytes(values.get(name, 0)) for name in names],
                    hovertemplate=f"%{{y}}, {title}: %{{customdata}}<extra></extra>",
                    orientation="h",
                    name=title,
                    marker={"color": [COLOURS[name] for name in names], "pattern": {"shape": pattern}},
                )
            )
    figure.update_layout(
        height=120 + 46 * len(names),
        barmode="group",
        showlegend=False,
        margin={"l": 120, "r": 12, "t": 10, "b": 46},
        xaxis={"title": unit, "rangemode": "tozero"},
        yaxis={"autorange": "reversed"},
    )
    return figure


def curve_drawing(points: Sequence[CurvePoint], plan: Plan) -> Any:
    """Draw step time against budget, with the plan that was taken."""
    from plotly.graph_objects import Figure, Scatter

    size, unit = units(max(point.budget_bytes for point in points))
    figure = Figure()
    for name, each, mode in (
        ("other budgets", [(point.budget_bytes, point.step_seconds) for point in points], "lines+markers"),
        ("this plan", [(plan.budget_bytes, plan.estimate.step_seconds)], "markers"),
    ):
        figure.add_trace(
            Scatter(
                x=[round(budget_bytes / size, 4) for budget_bytes, _ in each],
                y=[seconds for _, seconds in each],
                mode=mode,
                name=name,
                marker={"size": 8 if mode != "markers" else 13, "symbol": "circle" if mode != "markers" else "diamond"},
                line={"color": COLOURS["parameters"] if mode != "markers" else COLOURS["temporaries"]},
            )
        )
    figure.update_layout(
        height=340,
        margin={"l": 56, "r": 12, "t": 10, "b": 90},
        xaxis={"title": f"budget, {unit}"},
        yaxis={"title": "seconds a step", "rangemode": "tozero"},
        legend={"orientation": "h", "y": -0.25, "yanchor": "top"},
    )
    return figure
