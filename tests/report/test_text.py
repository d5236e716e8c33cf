"""A saved record is shown as tables that say what was expected beside what happened, also where torch is missing."""

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from packlight.measurement import Measurement
from packlight.records import CATEGORIES, Choice, Estimate, Plan, Run
from packlight.report.text import comparison, gathered, read_record, show, summary
from packlight.serial import JsonRecord

MIB = 2**20
PREDICTED = dict(zip(CATEGORIES, (4 * MIB, 3 * MIB, 2 * MIB, MIB, MIB // 2, 0), strict=True))
MEASURED = dict(zip(CATEGORIES, (4 * MIB, 3 * MIB, 2 * MIB, MIB, MIB // 2, MIB // 4), strict=True))
ESTIMATE = Estimate(
    device_peak_bytes=sum(PREDICTED.values()),
    host_peak_bytes=0,
    step_seconds=0.321,
    slowdown=1.25,
    plain_peak_bytes=20 * MIB,
    peak_by_category=PREDICTED,
    peak_moment="backward",
)
PLAN = Plan(
    device="cpu",
    budget_bytes=11 * MIB,
    exact=False,
    choices=(
        Choice("blocks.0", "recompute", 3 * MIB, 0.125),
        Choice("blocks.1", "recompute", 3 * MIB, 0.125),
        Choice("blocks.2", "keep", 3 * MIB, 0.0),
    ),
    state_formats={"weight": "4bit", "other.weight": "4bit", "bias": "fp32"},
    estimate=ESTIMATE,
    smallest_budget_bytes=9 * MIB,
    notes=("the loss was guessed",),
)
MEASUREMENT = Measurement(
    device_peak_bytes=sum(MEASURED.values()),
    host_peak_bytes=0,
    reserved_peak_bytes=16 * MIB,
    resident_peak_bytes=30 * MIB,
    step_seconds=0.456,
    num_steps=25,
    num_measured_steps=3,
    losses={"first": (2.5, 2.25), "last": (1.5, 1.125)},
    peak_by_category=MEASURED,
    peak_moment="forward",
    state_bytes=2 * MIB,
)
RUN = Run(("train.py", "--steps", "25"), PLAN, ESTIMATE, ESTIMATE, MEASUREMENT, {"torch": "2.13.0", "num_cpus": 2})
BARE_MEASUREMENT = dataclasses.replace(
    MEASUREMENT,
    reserved_peak_bytes=None,
    step_seconds=None,
    peak_by_category={},
    losses={"first": (), "last": ()},
)
BARE_RUN = Run(("train.py",), None, None, None, BARE_MEASUREMENT, {})


def shown(record: Plan | Run, *, width: int = 100, is_short: bool = False) -> str:
    file = io.StringIO()
    show(record, console=Console(file=file, width=width), is_short=is_short)
    return file.getvalue()


def cells(printed: str, title: str) -> list[str]:
    """The cells of the table row with this title, the title left out."""
    rows = [re.split("[│┃]", line)[1:-1] for line in printed.splitlines()]
    found = [[cell.strip() for cell in row[1:]] for row in rows if row and row[0].strip() == title]
    assert len(found) == 1, f"{len(found)} rows {title!r} in\n{printed}"
    return found[0]


@pytest.mark.parametrize("record", [PLAN, RUN, BARE_RUN], ids=["plan", "run", "bare run"])
def test_a_saved_record_is_read_as_what_it_is(record: JsonRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record


def test_each_category_s_prediction_stands_beside_its_measurement() -> None:
    printed = shown(RUN)
    assert cells(printed, "category") == ["predicted", "measured"]
    assert cells(printed, "parameters") == ["4.00 MiB", "4.00 MiB"]
    assert cells(printed, "gradients") == ["3.00 MiB", "3.00 MiB"]
    assert cells(printed, "optimizer states") == ["2.00 MiB", "2.00 MiB"]
    assert cells(printed, "activations") == ["1.00 MiB", "1.00 MiB"]
    assert cells(printed, "temporaries") == ["512.00 KiB", "512.00 KiB"]
    assert cells(printed, "other") == ["0 B", "256.00 KiB"]
    assert cells(printed, "all") == ["10.50 MiB", "10.75 MiB"]
    assert cells(printed, "where") == ["backward", "forward"]


def test_a_run_s_facts_are_shown() -> None:
    printed = shown(RUN)
    assert printed.startswith("run of train.py --steps 25\n")
    assert cells(printed, "step time") == ["0.456 s (predicted 0.321 s)"]
    assert cells(printed, "steps") == ["25, of which 3 were measured for the peak"]
    assert cells(printed, "resident peak") == ["30.00 MiB"]
    assert cells(printed, "reserved peak") == ["16.00 MiB"]
    assert cells(printed, "loss") == ["2.5 at first, 1.125 at last"]
    assert cells(printed, "environment") == ["torch 2.13.0, num_cpus 2"]


def test_a_tier_s_rates_stand_beside_those_that_were_planned_with() -> None:
    plan = dataclasses.replace(PLAN, tier="disk", out_bytes_per_second=500.0 * MIB, in_bytes_per_second=2.0**30)
    measured = dataclasses.replace(
        MEASUREMENT, tier_peak_bytes=6 * MIB, out_bytes_per_second=25.0 * MIB, in_bytes_per_second=50.0 * MIB
    )
    said = (
        "up to 6.00 MiB on the disk, moved there at 25.00 MiB/s and back at 50.00 MiB/s "
        "(planned with 500.00 MiB/s and back at 1.00 GiB/s)"
    )
    run = dataclasses.replace(RUN, plan=plan, measurement=measured)
    assert f"; {said}" in summary(run) and cells(shown(run, width=200), "tier") == [said]
    assert "moved" not in summary(RUN)
    old = dataclasses.replace(plan, out_bytes_per_second=0.0, in_bytes_per_second=0.0)  # of a file without rates
    assert "planned with" not in summary(dataclasses.replace(run, plan=old))


@pytest.mark.parametrize("record", [PLAN, RUN], ids=["plan", "run"])
def test_the_choices_are_shown_and_neighbours_gathered(record: Plan | Run) -> None:
    printed = shown(record)
    assert str(PLAN) in printed
    assert cells(printed, "blocks.0-1") == ["recompute", "3.00 MiB", "0.125 s"]
    assert cells(printed, "blocks.2") == ["keep", "3.00 MiB", "0 s"]


def test_parameters_are_listed_by_their_states_format_those_of_equal_layers_in_a_row() -> None:
    layers = {f"layers.{at}.{name}": "fp32" if at == 2 else "4bit" for at in range(5) for name in ("up", "down")}
    elements = {name: 4096 if name.endswith("up") else 2048 for name in layers}
    plan = dataclasses.replace(PLAN, state_formats=layers, num_elements=elements)
    printed = shown(plan)
    assert cells(printed, "layers.0-1,3-4.up") == ["4bit", "4,096"]
    assert cells(printed, "layers.2.down") == ["fp32", "2,048"]
    assert "4bit for 8 parameters (24,576 elements), fp32 for 2 parameters (6,144 elements)" in str(plan)
    assert cells(shown(PLAN), "other.weight") == ["4bit"]  # a record that does not tell the elements


def test_names_that_differ_in_several_numbers_are_gathered_where_all_of_them_are_alike() -> None:
    square = {f"a.{row}.b_{column}:7": 0 for row in range(3) for column in (1, 2)}
    assert gathered(square) == [("a.0-2.b_1-2:7", list(square))]
    assert [name for name, _ in gathered({**square, "a.2.b_2:7": 1})] == ["a.0-1.b_1-2:7", "a.2.b_1:7", "a.2.b_2:7"]
    calls = {"a:1": 0, "a:2": 0, "a.1": 0, "a.b": 0}  # the number of a call is no layer's
    assert [name for name, _ in gathered(calls)] == list(calls)


def test_in_short_only_what_changes_something_is_listed() -> None:
    printed = shown(PLAN, is_short=True)
    assert cells(printed, "blocks.0-1")[0] == "recompute"
    assert "1 other kept; --all lists them" in printed and "blocks.2" not in printed.partition("choices")[2]
    kept = dataclasses.replace(PLAN, choices=PLAN.choices[2:], state_formats={"weight": "fp32"})
    assert kept.changes_nothing and not PLAN.changes_nothing
    assert "nothing is changed: " in shown(kept) and "choices" in shown(kept)
    assert "choices" not in shown(kept, is_short=True) and "nothing is changed: " not in shown(PLAN)


def test_what_else_could_be_done_stands_beside_each_choice_and_beside_what_is_kept() -> None:
    options = {"keep": 0.0, "offload": 0.5, "compress": 0.25}
    treated = Choice("a:0", "compress", 2**20, 0.25, codec="int8", sites=("a:0",), held_seconds=2.0, options=options)
    kept = Choice("b:0", "keep", 2**20, 0.0, held_seconds=3.0, options=options)
    printed = shown(dataclasses.replace(PLAN, choices=(treated,), kept=(kept,)), width=140)
    assert cells(printed, "a:0") == ["compress", "1.00 MiB", "2 s", "0.25 s", "offload 0.5 s"]
    assert cells(printed, "b:0") == ["keep", "1.00 MiB", "3 s", "0 s", "compress 0.25 s, offload 0.5 s"]


def test_layers_with_other_bytes_stand_alone_and_times_are_told_from_the_shortest_on() -> None:
    choices = (Choice("a.0", "keep", 1, 0.0), Choice("a.1", "keep", 2, 0.5), Choice("a.2", "keep", 2, 0.25))
    printed = shown(dataclasses.replace(PLAN, choices=choices))
    assert cells(printed, "a.0")[1:] == ["1 B", "0 s"] and cells(printed, "a.1-2")[1:] == ["2 B", "0.25 to 0.5 s"]


def test_a_plan_has_no_column_for_what_is_measured() -> None:
    printed = shown(PLAN)
    assert cells(printed, "category") == ["predicted"]
    assert cells(printed, "all") == ["10.50 MiB"]
    assert cells(printed, "where") == ["backward"]
    assert "run of" not in printed and "step time" not in printed


def test_what_is_not_known_is_a_dash_or_left_out() -> None:
    printed = shown(BARE_RUN)
    assert cells(printed, "step time") == ["-"]
    assert cells(printed, "category") == ["measured"] and "parameters" not in printed
    assert cells(printed, "all") == ["10.75 MiB"]
    assert "reserved peak" not in printed and "loss" not in printed and "None" not in printed


def test_at_60_columns_no_table_is_wider_and_no_figure_is_cut() -> None:
    path = "a-very-long-folder-name/" * 4
    printed = shown(dataclasses.replace(RUN, environment={"platform": path}), width=60)
    assert all(len(line) <= 60 for line in printed.splitlines() if line[:1] in "│┃┏┌├└┡")
    assert "…" not in printed
    assert cells(printed, "optimizer states") == ["2.00 MiB", "2.00 MiB"]
    assert cells(printed, "step time") == ["0.456 s (predicted 0.321 s)"]


def test_what_a_script_s_author_wrote_is_printed_as_it_is() -> None:
    odd = "[/bold] [red]x :smile: [0:9]"
    choices = (Choice("[red]block[/red]", "keep", 1, 0.0),)
    plan = dataclasses.replace(PLAN, choices=choices, notes=(odd,))
    run = Run((odd, "a b"), plan, ESTIMATE, None, MEASUREMENT, {"hardware": "[bold]chip[/bold]"})
    printed = shown(run)
    assert printed.startswith(f"run of '{odd}' 'a b'\n")
    assert f"note: {odd}\n" in printed
    assert cells(printed, "[red]block[/red]")[0] == "keep"
    assert cells(printed, "environment") == ["hardware [bold]chip[/bold]"]


def test_a_summary_is_one_line_with_both_peaks_and_step_times() -> None:
    followed = f"in {RUN.measurement.num_measured_steps} of {RUN.measurement.num_steps} steps"
    end = "resident peak 30.00 MiB"
    expected = "0.456 s a step (predicted 0.321 s)"
    assert summary(RUN) == f"packlight: peak 10.75 MiB (predicted 10.50 MiB) {followed}, {end}, {expected}"
    assert summary(BARE_RUN) == f"packlight: peak 10.75 MiB {followed}, {end}, - a step"


def test_a_resident_peak_below_the_tensors_is_explained_on_the_cpu_alone() -> None:
    why = "beyond what was resident before step 1, so without parameters and memory that is used again"
    low = dataclasses.replace(BARE_MEASUREMENT, resident_peak_bytes=8 * MIB)
    for said in (summary(dataclasses.replace(BARE_RUN, measurement=low)), str(low)):
        assert f"resident peak 8.00 MiB ({why})" in said
    compared = comparison({"low": dataclasses.replace(BARE_RUN, measurement=low)}, {"low": 1.0})
    assert isinstance(compared, Table) and compared.caption == f"resident: {why}"
    on_a_gpu = dataclasses.replace(low, reserved_peak_bytes=16 * MIB)  # other memory than the tensors'
    for measured in (on_a_gpu, BARE_MEASUREMENT):
        assert why not in str(measured)


def test_the_peak_under_the_final_plan_stands_beside_the_one_of_the_whole_run() -> None:
    mended = dataclasses.replace(RUN, measurement=dataclasses.replace(MEASUREMENT, plan_peak_bytes=8 * MIB))
    assert "peak 10.75 MiB, 8.00 MiB under the final plan (predicted 10.50 MiB) in" in summary(mended)
    assert cells(shown(mended), "all, under the final plan") == ["", "8.00 MiB"]
    assert "final plan" not in shown(BARE_RUN) + shown(RUN)


def test_a_summary_says_when_the_peak_is_above_the_budget() -> None:
    assert RUN.plan is not None
    peak_bytes = RUN.measurement.device_peak_bytes
    tight = dataclasses.replace(RUN, plan=dataclasses.replace(RUN.plan, budget_bytes=peak_bytes - 2**20))
    assert summary(tight).endswith("; ABOVE THE BUDGET by 1.00 MiB")


def test_runs_are_compared_column_by_column() -> None:
    file = io.StringIO()
    Console(file=file, width=80).print(comparison({"plain": BARE_RUN, "planned": RUN}, {"plain": 1.5, "planned": 1.25}))
    printed = file.getvalue()
    assert cells(printed, "budget") == ["-", "11.00 MiB"]
    assert cells(printed, "peak predicted") == ["-", "10.50 MiB"]
    assert cells(printed, "peak measured") == ["10.75 MiB", "10.75 MiB"]
    assert cells(printed, "seconds per step") == ["-", "0.456 s"]
    assert cells(printed, "held-out loss") == ["1.5000", "1.2500"]


@pytest.mark.parametrize("kind", ["profile", None, 3])
def test_another_kind_of_file_is_refused(kind: object, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(
        f'{{"schema": 1, "kind": {"null" if kind is None else f"{kind!r}"}}}'.replace("'", '"')
    )
    with pytest.raises(ValueError, match=r"other\.json: got a record of kind"):
        read_record(tmp_path / "other.json")


@pytest.mark.parametrize("record", [PLAN, RUN], ids=["plan", "run"])
def test_explain_needs_no_torch(record: JsonRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "record.json")
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("raise ImportError('there is no torch here')")
    # In front of every other place, and known to work: importing torch fails there.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "stub"), "COLUMNS": "100"}
    broken = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, check=False)
    assert broken.returncode == 1 and b"there is no torch here" in broken.stderr
    command = [sys.executable, "-m", "packlight", "explain", "record.json"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == shown(read_record(tmp_path / "record.json"))
