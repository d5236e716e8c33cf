"""The page of a record has its numbers, holds all it needs, and works in a browser: wide, narrow, light and dark."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from packlight.budget import format_bytes
from packlight.cli import main
from packlight.lanes import Lanes, Stretch, seconds_of
from packlight.records import CurvePoint, Plan, Run
from packlight.report import lanes
from packlight.report.html import MOST_ROWS, write
from tests.report.browser import MISSING, Browser, browser, is_there

SCRIPT = Path(__file__).parents[1] / "scripts" / "flat_sequential.py"
NAME = "<b>of & 'one'.py"
NEEDS_BROWSER = pytest.mark.skipif(not is_there(), reason=MISSING)
MOVES = Lanes(
    out=(Stretch("layers.<1>:0", 3 * 2**20, 0.25, 0.5), Stretch("layers.2:0 to layers.4:0", 2**22, 0.5, 1.25, 3)),
    back=(Stretch("layers.4:0", 2**20, 1.5, 1.75), Stretch("layers.<1>:0", 3 * 2**20, 2.0, 2.5)),
    waits_out=(Stretch("layers.2:0", 0, 0.75, 1.0),),
    waits_back=(Stretch("layers.<1>:0", 0, 2.25, 2.5),),
    forward_end=1.5,
    backward_end=3.0,
    update_seconds=0.5,
    unplaced_seconds=0.125,
    num_microbatches=2,
)
SCREENS = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The record of a run of a small script with a name that is no HTML."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(SCRIPT, folder / NAME)
    options = ["--batch", "512", "--depth", "6", "--width", "96", "--steps", "4"]
    command = [sys.executable, "-m", "packlight", "run", "--budget", "1GiB", "--record", "run.json", NAME, *options]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return Run.load(folder / "run.json")


def moving(run: Run) -> Run:
    """Return a run whose plan says that groups move."""
    assert run.plan is not None and run.plan.predicted is not None
    predicted = dataclasses.replace(run.plan.predicted, lanes=MOVES)
    return dataclasses.replace(run, plan=dataclasses.replace(run.plan, tier="disk", predicted=predicted))


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    moving(run).save(path.with_name("run.json"))
    done = CliRunner().invoke(main, ["explain", str(path.with_name("run.json")), "--html", str(path)])
    assert done.exit_code == 0, done.output
    assert done.output.endswith(f"the page is {path}\n") and "bytes at the peak" in done.output
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []
    return path


class Tables(HTMLParser):
    """The rows of each table by its caption, and every address that the page names in a tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self._rows: list[list[str]] = []
        self._caption, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag if tag in ("td", "th", "caption") else ""
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if self._inside == "caption":
            self._caption += data
        elif self._inside:
            self._rows[-1][-1] += data


def test_the_numbers_on_the_page_are_the_record_s(run: Run, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tables, plan, measured = Tables(text).tables, run.plan, run.measurement
    assert plan is not None and run.predicted is not None and run.measured is not None
    cards = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert cards["budget"] == format_bytes(plan.budget_bytes)
    assert cards["predicted peak"] == format_bytes(plan.estimate.device_peak_bytes)
    assert cards["measured peak"] == format_bytes(measured.device_peak_bytes)
    assert cards["peak if nothing is changed"] == format_bytes(plan.estimate.plain_peak_bytes)
    assert cards["predicted slowdown"] == f"{plan.estimate.slowdown:.2f}x"
    at_peak = {row[0]: row[1:] for row in tables["bytes at the peak"]}
    for name, predicted_bytes in plan.estimate.peak_by_category.items():
        found = at_peak[name.replace("_", " ")]
        assert found == [format_bytes(predicted_bytes), format_bytes(measured.peak_by_category[name])]
    for name, memory in (("predicted", run.predicted), ("measured", run.measured)):
        (title,) = (each for each in tables if each.startswith(f"{name}: ") and "storages" in each)
        largest = memory.alive(memory.peak)[:MOST_ROWS]
        assert [row[0] for row in tables[title][1:]] == [format_bytes(each.num_bytes) for each in largest]
        assert [row[2:4] for row in tables[title][1:]] == [[each.site, each.code] for each in largest]
        parts = {row[0]: row[1] for row in tables[f"{name}: most bytes in each part of the step"]}
        assert format_bytes(memory.peak_bytes) == parts[memory.phase_at(memory.peak)]
    told = {choice.group: choice for choice in plan.choices if not choice.sites}
    rows = {row[0]: row for row in tables["choices"]}
    for group in rows.keys() & told.keys():
        assert rows[group][1:3] == [told[group].choice, format_bytes(told[group].bytes)]
    assert ["last", ", ".join(f"{loss:.6g}" for loss in measured.losses["last"])] in tables["losses"]
    assert ["torch", run.environment["torch"]] in tables["environment"]


def test_predicted_and_measured_lines_are_the_record_s_to_the_byte(run: Run) -> None:
    assert run.plan is not None and run.predicted is not None and run.measured is not None
    assert run.predicted.peak_bytes == run.plan.estimate.device_peak_bytes
    assert run.measured.peak_bytes == run.measurement.device_peak_bytes
    at_peak = run.measured.at(run.measured.peak)
    assert dict.fromkeys(run.measurement.peak_by_category, 0) | at_peak == run.measurement.peak_by_category
    codes = {each.code for each in run.measured.held if each.category == "activations"}
    assert any(code.startswith(NAME) or code.endswith(" in main") for code in codes)


def test_copies_are_drawn_and_told_where_groups_move_and_there_alone(run: Run, page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rows = Tables(text).tables["predicted: copies and compute over the step"][1:]
    assert [row[4:] for row in rows if row[0] == "compute"] == [
        [f"{start:.4g}", f"{end:.4g}"]
        for start, end in ((0, 0.75), (0.75, 1), (1, 1.5), (1.5, 2.25), (2.25, 2.5), (2.5, 3), (3, 3.5))
    ]
    for lane, each in (("out", MOVES.out), ("back", MOVES.back)):
        told = [row[2:4] for row in rows if row[0] == lane]
        assert told == [[format_bytes(one.num_bytes), f"{one.end - one.start:.3g}"] for one in each]
    assert ["out", "layers.2:0 to layers.4:0 (3 copies joined), out", "4.00 MiB", "0.75", "0.5", "1.25"] in rows
    assert "4 copies out, 7.00 MiB in 1 s; 2 copies back, 4.00 MiB in 0.75 s. Compute waits 0.25 s in forward" in text
    assert "A step does this 2 times" in text and "0.125 s of the step" in text
    drawn = lanes.copies_drawing(MOVES)
    seconds = {trace.name: sum(trace.x) for trace in drawn.data}
    assert seconds.pop(lanes.LOOKS["wait"].name) == seconds_of((*MOVES.waits_out, *MOVES.waits_back)) == 0.5
    assert [*seconds.values()] == [1.25, 1.25, 0.5, seconds_of(MOVES.out), seconds_of(MOVES.back)]
    before = json.loads(json.dumps(run.to_dict()))  # as records were that know of no lanes
    del before["plan"]["predicted"]["lanes"], before["measured"]["lanes"]
    assert Run.from_dict(before) == run
    write(run, tmp_path / "page.html")
    assert "Copies to" in text and "Copies to" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_page_fetches_nothing_and_the_script_s_name_is_text_on_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [each for each in Tables(text).addresses if not each.startswith("data:")] == []
    assert text.count("<html") == text.count("</html>") == 1 and text.count("plotly.js v") == 1
    outside = text[: text.index("<script>")] + text[text.index("</head>") :]
    assert NAME not in outside and "<b>of" not in outside and html.escape(NAME) in outside


def test_markup_in_any_string_of_a_record_is_text_on_the_page(run: Run, tmp_path: Path) -> None:
    """Records are shared: what stands in one shall not run where it is read."""
    attack = "<img src=x onerror=alert(1)>"

    def spoiled(value: object, name: str = "") -> object:
        if isinstance(value, dict):
            return {key: spoiled(item, key) for key, item in value.items()}
        if isinstance(value, list):
            return [spoiled(item, name) for item in value]
        fixed = ("kind", "choice", "category", "tier", "codec", "engine")
        return f"{value}{attack}" if isinstance(value, str) and name not in fixed else value

    record: Any = spoiled(moving(run).to_dict())
    made = Run.from_dict(record)
    write(made, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    body = text[text.index("</head>") :]
    scripts = re.findall(r"<script.*?</script>", body, re.DOTALL)
    for script in scripts:  # data of drawings, in which markup is text
        body = body.replace(script, "")
    assert attack not in body and html.escape(attack) in body
    assert made.plan is not None and attack not in made.plan._repr_html_()


def test_a_record_without_a_line_of_memory_has_a_page_and_its_plan_s_curve_too(run: Run, tmp_path: Path) -> None:
    assert run.plan is not None
    old = json.loads(json.dumps(run.to_dict()))
    del old["measured"], old["plan"]["predicted"]
    write(Run.from_dict(old), tmp_path / "old.html")
    assert "does not say what lives over the step" in (tmp_path / "old.html").read_text(encoding="utf-8")
    points = (CurvePoint(2**28, 2**27, 2.0, 2.0), CurvePoint(2**30, 2**29, 1.0, 1.0))
    write(dataclasses.replace(run.plan, curve=points), tmp_path / "plan.html")
    tables = Tables((tmp_path / "plan.html").read_text(encoding="utf-8")).tables
    assert [row[0] for row in tables["step time against budget"][1:]] == ["256.00 MiB", "1.00 GiB"]
    bare = dataclasses.replace(run, plan=None, estimate=None, first_estimate=None, measured=None)
    write(bare, tmp_path / "bare.html")
    assert "measured peak" in (tmp_path / "bare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", ["folder", "no/parent.html", "run.json"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_printed(
    wrong: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    run.save(tmp_path / "run.json")
    before = (tmp_path / "run.json").read_bytes()
    done = CliRunner().invoke(main, ["explain", str(tmp_path / "run.json"), "--html", str(tmp_path / wrong)])
    assert done.exit_code == 2 and "--html" in done.output and "bytes at the peak" not in done.output
    assert (tmp_path / "run.json").read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "run.json"]


def test_without_plotly_a_page_is_refused_and_the_tables_are_printed(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")
    hide = "import sys; sys.modules['plotly'] = None; from packlight.cli import main; main()"
    for options, status in ([], 0), (["--html", "page.html"], 2):
        command = [sys.executable, "-c", hide, "explain", "run.json", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == status
    assert "which is not installed; pip install 'packlight[report]'" in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_plan_is_a_small_table_in_a_notebook(run: Run) -> None:
    assert run.plan is not None
    plan = dataclasses.replace(run.plan, notes=("a <script> of notes",))
    shown = plan._repr_html_()
    assert format_bytes(plan.estimate.device_peak_bytes) in shown and "a &lt;script&gt; of notes" in shown
    assert len(shown) < 20_000 and isinstance(plan, Plan)


# In a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as driven:
        yield driven


def plot_area(driven: Browser, name: str) -> tuple[float, float, float, float]:
    driven.until(f"return Boolean(document.querySelector('#{name} .nsewdrag'))")
    script = f"""
        const area = document.querySelector('#{name} .nsewdrag');
        area.scrollIntoView({{block: 'center'}});
        const box = area.getBoundingClientRect();
        return [box.x, box.y, box.width, box.height];
    """
    x, y, width, height = driven.run(script)
    return x, y, width, height


@NEEDS_BROWSER
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_nothing_overflows_and_colours_follow_the_reader(
    width: int, scheme: str, chromium: Browser, page: Path
) -> None:
    chromium.show(page, width=width, scheme=scheme)
    chromium.until("return document.querySelectorAll('.plotly-graph-div .main-svg').length >= 8")
    assert chromium.console() == []
    assert chromium.run("return document.documentElement.scrollWidth <= innerWidth")
    assert chromium.run(
        "return [...document.querySelectorAll('.plotly-graph-div')].every(each => each.scrollWidth <= innerWidth)"
    )
    colours = chromium.run("""
        const text = document.querySelector('#memory-measured .xtitle');
        return [getComputedStyle(document.body).backgroundColor, getComputedStyle(text).fill];
    """)
    levels = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours]
    assert levels[0] > 240 > 60 > levels[1] if scheme == "light" else levels[0] < 60 < 200 < levels[1]
    assert chromium.run("return performance.getEntriesByType('resource').map(each => each.name)") == []


@NEEDS_BROWSER
def test_the_pointer_tells_sites_and_lines_and_a_drag_zooms(chromium: Browser, page: Path, run: Run) -> None:
    chromium.show(page)
    x, y, width, height = plot_area(chromium, "memory-measured")
    chromium.mouse(("mouseMoved", x + 5, y + height / 2), ("mouseMoved", x + width / 3, y + height / 2))
    script = "return [...document.querySelectorAll('#memory-measured .hoverlayer text')].map(e => e.textContent).join()"
    told = chromium.until(script)
    assert run.measured is not None
    assert any(each.site in told and each.code in told for each in run.measured.held if each.site and each.code)
    assert "the largest" in told and " in " in told
    scale = "return document.getElementById('memory-measured')._fullLayout.xaxis.range"
    before = chromium.run(scale)
    middle = y + height / 2
    chromium.mouse(
        *(("mouseMoved", x + width * 0.25, middle), ("mousePressed", x + width * 0.25, middle)),
        *(("mouseMoved", x + width * at, middle) for at in (0.3, 0.4, 0.5)),
        ("mouseReleased", x + width * 0.5, middle),
    )
    chromium.until(f"const now = (() => {{ {scale} }})(); return now[1] - now[0] < {(before[1] - before[0]) / 2}")
    assert chromium.console() == []


@NEEDS_BROWSER
@pytest.mark.parametrize("width", [1280, 400])
def test_the_pointer_tells_a_copy_s_group_bytes_and_seconds(width: int, chromium: Browser, page: Path) -> None:
    chromium.show(page, width=width)
    left, top, wide, high = plot_area(chromium, "copies")
    first = MOVES.out[0]
    x, y = left + wide * (first.start + first.end) / 2 / MOVES.end, top + high / 2  # of three lanes the second
    chromium.mouse(("mouseMoved", x, top - 5), ("mouseMoved", x, y))
    told = chromium.until(
        "return [...document.querySelectorAll('#copies .hoverlayer text')].map(e => e.textContent).join()"
    )
    assert told == "layers.<1>:0, out3.00 MiB, 0.25 sfrom 0.25 to 0.5 s" and chromium.console() == []


@NEEDS_BROWSER
def test_a_part_of_the_step_is_shown_by_the_keyboard_alone(chromium: Browser, page: Path, run: Run) -> None:
    chromium.show(page)
    plot_area(chromium, "memory-predicted")
    assert run.predicted is not None
    backward = next(phase for phase in run.predicted.phases if phase.name == "backward")
    button = "[...document.querySelectorAll('[data-drawing=memory-predicted]')].find(e => e.textContent == 'backward')"
    chromium.run(f"{button}.focus()")
    for kind in ("keyDown", "keyUp"):
        chromium.devtools("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13,
                          text="\r" if kind == "keyDown" else "")  # fmt: skip
    scale = "document.getElementById('memory-predicted')._fullLayout.xaxis.range"
    chromium.until(f"return {scale}[0] == {backward.start} && {scale}[1] == {backward.end}")
    assert chromium.run("return [...document.querySelectorAll('.scroll')].every(each => each.tabIndex == 0)")
