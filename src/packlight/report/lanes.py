"""Draws what lanes do over the seconds of a step: compute, and the copies that go on beside it.

Copies that hide behind compute cost nothing, and those that do not are what makes a plan slow. Which is which shows
where the lanes stand below each other, on one axis of seconds. So a pipeline's ranks are drawn, and what a plan for one
device moves to a tier and back.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from packlight.budget import format_bytes
from packlight.lanes import Lanes, Stretch, seconds_of
from packlight.report.frame import escaped


class Look(NamedTuple):
    """How bars of one kind look: the kind's name, a colour, and plotly's name of a pattern ("" for none)."""

    name: str
    colour: str
    pattern: str = ""


class Drawn(NamedTuple):
    """A bar: its lane, its kind, its seconds, and what the pointer tells of it, as HTML."""

    lane: str
    kind: str
    start: float
    end: float
    told: str


LOOKS = {
    "forward": Look("forward", "#4c78a8"),
    "backward": Look("loss and backward", "#e45756"),
    "optimizer": Look("the optimiser's step", "#54a24b"),
    "wait": Look("compute waits (hatched)", "#eeca3b", "/"),
    "out": Look("out to the tier", "#9d9da1"),
    "back": Look("back from it", "#b279a2"),
}
"""By what is done, as `pipeline.py` colours it. Source: Tableau's ten colours."""
LANES = ("compute", "out", "back")


def lanes_drawing(bars: Sequence[Drawn], looks: Mapping[str, Look], order: Sequence[str]) -> Any:
    """Draw bars in lanes.

    Args:
        bars: what is drawn.
        looks: by kind, in the order of a legend.
        order: the lanes, from top to bottom.

    Returns:
        The figure.
    """
    from plotly.graph_objects import Bar, Figure

    figure = Figure()
    for kind, look in looks.items():
        each = [bar for bar in bars if bar.kind == kind]
        if not each:
            continue
        figure.add_trace(
            Bar(
                base=[bar.start for bar in each],
                x=[bar.end - bar.start for bar in each],
                y=[bar.lane for bar in each],
                customdata=[bar.told for bar in each],
                hovertemplate="%{customdata}<extra></extra>",
                name=look.name,
                orientation="h",
                # without edges plotly draws a bar a pixel wide at least, and parts neighbours
                marker={"color": look.colour, "line": {"width": 0}, "pattern": {"shape": look.pattern}},
            )
        )
    figure.update_layout(
        barmode="overlay",
        bargap=0.15,
        xaxis={"title": "seconds"},
        yaxis={"categoryorder": "array", "categoryarray": list(order), "autorange": "reversed"},
        hoverlabel={"align": "left"},
    )
    return figure


def copies_drawing(lanes: Lanes) -> Any:
    """Draw what moves to a tier and back over a step, and when compute waits for it."""
    figure = lanes_drawing(list(_drawn(lanes)), LOOKS, LANES)
    figure.update_layout(
        height=230,
        margin={"l": 64, "r": 12, "t": 30, "b": 46},
        showlegend=False,
        xaxis={"range": [0, lanes.end]},
    )
    return figure


def _drawn(lanes: Lanes) -> Iterator[Drawn]:
    for lane, kind, what, each in everything(lanes):
        size = f"{format_bytes(each.num_bytes)}, " if each.num_bytes else ""
        told = f"<b>{escaped(what)}</b><br>{size}{seconds(each)} s<br>from {each.start:.4g} to {each.end:.4g} s"
        yield Drawn(lane, kind, each.start, each.end, told)


def everything(lanes: Lanes) -> Iterator[tuple[str, str, str, Stretch]]:
    """Yield what is drawn of a record: the lane, the kind in `LOOKS`, what is done in words, and when."""
    for kind, start, end in lanes.compute():
        yield "compute", kind, LOOKS[kind].name, Stretch("", 0, start, end)
    for each in (*lanes.waits_out, *lanes.waits_back):
        yield "compute", "wait", f"waits for {_group(each, 'waits')}", each
    for kind, lane in (("out", lanes.out), ("back", lanes.back)):
        for each in lane:
            yield kind, kind, f"{_group(each, 'copies')}, {kind}", each


def _group(each: Stretch, kind: str) -> str:
    return each.group if each.num_joined == 1 else f"{each.group} ({each.num_joined} {kind} joined)"


def seconds(each: Stretch) -> str:
    """Say how long something takes."""
    return f"{each.end - each.start:.3g}"


def legend(lanes: Lanes) -> list[tuple[str, str]]:
    """Return the names and colours of what is drawn."""
    kinds = {kind for _, kind, _, _ in everything(lanes)}
    return [(look.name, look.colour) for kind, look in LOOKS.items() if kind in kinds]


def rows(lanes: Lanes) -> tuple[list[str], list[list[str]]]:
    """Return what is drawn as a table, in the order of time: columns and rows."""
    ordered = sorted(everything(lanes), key=lambda each: (each[3].start, LANES.index(each[0])))
    columns = ["lane", "what", "bytes", "seconds", "from, s", "to, s"]
    return columns, [
        [
            lane,
            what,
            format_bytes(each.num_bytes) if each.num_bytes else "",
            seconds(each),
            f"{each.start:.4g}",
            f"{each.end:.4g}",
        ]
        for lane, _, what, each in ordered
    ]


def summed(lanes: Lanes) -> str:
    """Say in sentences what the lanes add up to, and what they do not show."""
    told = [
        f"{_counted(lane)} {way}, {format_bytes(sum(each.num_bytes for each in lane))} in {seconds_of(lane):.3g} s"
        for way, lane in (("out", lanes.out), ("back", lanes.back))
    ]
    waits = f"{seconds_of(lanes.waits_out):.3g} s in forward and {seconds_of(lanes.waits_back):.3g} s in backward"
    said = [f"{told[0]}; {told[1]}. Compute waits {waits} for them."]
    if lanes.num_microbatches > 1:
        said.append(f"A step does this {lanes.num_microbatches} times, and the optimiser's step once.")
    if lanes.unplaced_seconds > 0:
        besides = "computing again, encoding, and what copying takes from compute"
        said.append(f"Not drawn: {besides}, {lanes.unplaced_seconds:.3g} s of the step.")
    most = max(each.num_joined for each in (*lanes.out, *lanes.back, *lanes.waits_out, *lanes.waits_back))
    if most > 1:
        said.append(f"They are too many to be told one by one: up to {most} neighbours are joined to one bar.")
    return " ".join(said)


def _counted(lane: Sequence[Stretch]) -> str:
    number = sum(each.num_joined for each in lane)
    return f"{number} {'copy' if number == 1 else 'copies'}"
