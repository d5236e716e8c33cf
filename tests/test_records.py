"""Records come back from JSON as they were, are written whole or not at all, and are refused in plain words."""

import dataclasses
import json
import math
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from packlight.measurement import Measurement
from packlight.records import CATEGORIES, CHOICES, Choice, Estimate, Plan, Run
from packlight.serial import SCHEMA, JsonRecord
from packlight.step import OptimizerCost, Profile, Region, Save, Storage

NAMES = st.text(max_size=8)
SIZES = st.integers(0, 2**62)
SECONDS = st.floats(0, allow_infinity=False)
DIVIDED = st.fixed_dictionaries(dict.fromkeys(CATEGORIES, SIZES))
FORMATS = st.dictionaries(NAMES, st.sampled_from(["fp32", "paper4bit", "as is"]), max_size=3)
LOSSES = st.lists(st.floats(allow_nan=False), max_size=3).map(tuple)
JSON_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), NAMES)


def tuples(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=3).map(tuple)


CHOSEN = st.builds(Choice, group=NAMES, choice=st.sampled_from(CHOICES), bytes=SIZES, seconds=SECONDS)
ESTIMATES = st.builds(
    Estimate,
    device_peak_bytes=SIZES,
    host_peak_bytes=SIZES,
    step_seconds=SECONDS,
    slowdown=SECONDS,
    plain_peak_bytes=SIZES,
    peak_by_category=DIVIDED,
    peak_moment=NAMES,
)
PLANS = st.builds(
    Plan,
    device=st.sampled_from(["cpu", "cuda"]),
    budget_bytes=SIZES,
    exact=st.booleans(),
    choices=tuples(CHOSEN),
    state_formats=FORMATS,
    estimate=ESTIMATES,
    smallest_budget_bytes=SIZES,
    notes=tuples(NAMES),
    hardware=NAMES,
)
MEASUREMENTS = st.builds(
    Measurement,
    device_peak_bytes=SIZES,
    host_peak_bytes=SIZES,
    reserved_peak_bytes=st.none() | SIZES,
    resident_peak_bytes=SIZES,
    step_seconds=st.none() | SECONDS,
    num_steps=SIZES,
    num_measured_steps=SIZES,
    losses=st.fixed_dictionaries({"first": LOSSES, "last": LOSSES}),
    peak_by_category=st.just({}) | DIVIDED,
    peak_moment=NAMES,
    state_bytes=SIZES,
)
RUNS = st.builds(
    Run,
    script=tuples(NAMES),
    plan=st.none() | PLANS,
    estimate=st.none() | ESTIMATES,
    first_estimate=st.none() | ESTIMATES,
    measurement=MEASUREMENTS,
    environment=st.dictionaries(NAMES, JSON_VALUES, max_size=3),
)
# What is not named here is built from the types of the fields.
PROFILES = st.builds(
    Profile,
    device=NAMES,
    resident_bytes=DIVIDED,
    storages=tuples(st.builds(Storage)),
    saves=tuples(st.builds(Save)),
    regions=tuples(st.builds(Region, forward_seconds=SECONDS)),
    optimizers=tuples(st.builds(OptimizerCost, seconds=SECONDS, formats=FORMATS)),
    seconds=SECONDS,
)

ESTIMATE = Estimate(
    device_peak_bytes=1000,
    host_peak_bytes=0,
    step_seconds=0.5,
    slowdown=1.25,
    plain_peak_bytes=1500,
    peak_by_category=dict(zip(CATEGORIES, (400, 300, 200, 100, 0, 0), strict=True)),
    peak_moment="backward",
)
PLAN = Plan(
    device="cpu",
    budget_bytes=1100,
    exact=False,
    choices=(Choice("blocks.0", "recompute", 300, 0.1), Choice("blocks.1", "keep", 300, 0.0)),
    state_formats={"weight": "paper4bit", "bias": "fp32"},
    estimate=ESTIMATE,
    smallest_budget_bytes=900,
)
MEASUREMENT = Measurement(
    device_peak_bytes=990,
    host_peak_bytes=0,
    reserved_peak_bytes=None,
    resident_peak_bytes=5000,
    step_seconds=None,
    num_steps=2,
    num_measured_steps=2,
    losses={"first": (2.5, 2.0), "last": (2.5, 2.0)},
    peak_by_category={},
    peak_moment="forward",
    state_bytes=200,
)
RUN = Run(("train.py", "--steps", "2"), PLAN, ESTIMATE, None, MEASUREMENT, {"torch": "2.13.0", "num_cpus": 2})


@given(st.one_of(PLANS, RUNS, PROFILES))
def test_a_record_comes_back_from_json_as_it_was(record: JsonRecord) -> None:
    assert type(record).from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize("record", [PLAN, RUN], ids=["plan", "run"])
def test_a_saved_record_is_loaded_as_it_was(record: JsonRecord, tmp_path: Path) -> None:
    record.save(tmp_path / "record.json")
    assert type(record).load(tmp_path / "record.json") == record
    assert type(record).load(str(tmp_path / "record.json")) == record


def test_a_diverged_run_can_be_saved_and_read(tmp_path: Path) -> None:
    losses = {"first": (2.5,), "last": (math.nan, math.inf)}
    dataclasses.replace(RUN, measurement=dataclasses.replace(MEASUREMENT, losses=losses)).save(tmp_path / "run.json")
    last = Run.load(tmp_path / "run.json").measurement.losses["last"]
    assert math.isnan(last[0]) and last[1] == math.inf


def test_the_documented_keys_stand_in_the_json_of_a_run(tmp_path: Path) -> None:
    RUN.save(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text("utf-8"))
    peaks = {"device_peak_bytes", "host_peak_bytes", "step_seconds"}
    assert data["schema"] == SCHEMA == 1
    assert data["kind"] == "run"
    assert {*peaks, "slowdown"} <= data["estimate"].keys()
    assert {*peaks, "losses", "reserved_peak_bytes", "resident_peak_bytes"} <= data["measurement"].keys()
    assert {"budget_bytes", "choices", "state_formats"} <= data["plan"].keys()
    chosen = {"group": "blocks.0", "choice": "recompute", "bytes": 300, "seconds": 0.1, "codec": "", "sites": []}
    chosen |= {"held_seconds": 0.0, "options": {}}
    assert data["plan"]["choices"][0] == chosen
    assert data["plan"]["state_formats"] == {"weight": "paper4bit", "bias": "fp32"}
    assert data["measurement"]["losses"] == {"first": [2.5, 2.0], "last": [2.5, 2.0]}
    assert data["environment"] == {"torch": "2.13.0", "num_cpus": 2}


def test_a_plan_s_json_has_its_schema_and_its_kind(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    assert (data["schema"], data["kind"]) == (1, "plan")


@pytest.mark.parametrize(
    "record", [PLAN, ESTIMATE, MEASUREMENT, RUN, PLAN.choices[0]], ids=lambda each: type(each).__name__
)
def test_a_record_is_frozen(record: Any) -> None:
    for field in dataclasses.fields(record):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field.name, None)


# A file appears whole or not at all


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """Let writes beyond a size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    RUN.save(path)
    before = path.read_bytes()
    with pytest.raises(OSError), files_of_at_most(len(before) // 2):
        dataclasses.replace(RUN, script=("other.py",)).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    RUN.save(tmp_path / "run.json")
    before = (tmp_path / "run.json").read_text("utf-8")
    with open(tmp_path / "run.json", encoding="utf-8") as reader:
        dataclasses.replace(RUN, script=("other.py",)).save(tmp_path / "run.json")
        assert reader.read() == before
    assert Run.load(tmp_path / "run.json").script == ("other.py",)


@pytest.mark.parametrize("earlier", [True, False])
def test_what_json_cannot_hold_leaves_the_folder_as_it_was(earlier: bool, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    if earlier:
        RUN.save(path)
    with pytest.raises(TypeError):
        dataclasses.replace(RUN, environment={"device": object()}).save(path)
    assert os.listdir(tmp_path) == (["run.json"] if earlier else [])
    if earlier:
        assert Run.load(path) == RUN


def test_a_folder_in_the_file_s_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(OSError):
        RUN.save(tmp_path / "run.json")
    assert os.listdir(tmp_path) == ["run.json"] and os.listdir(tmp_path / "run.json") == []


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RUN.save(tmp_path / "missing" / "run.json")
    assert os.listdir(tmp_path) == []


def test_others_can_read_a_saved_file(tmp_path: Path) -> None:
    RUN.save(tmp_path / "run.json")
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o644


# What is no record is refused in plain words


def edited(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(RUN.to_dict()))
    change(data)
    return data


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer schema": (lambda data: data.update(schema=2), "schema 2 and this packlight reads 1"),
    "no schema": (lambda data: data.pop("schema"), "schema None"),
    "other kind": (lambda data: data.update(kind="plan"), "kind 'plan'; wanted 'run'"),
    "no kind": (lambda data: data.pop("kind"), "kind None; wanted 'run'"),
    "missing field": (
        lambda data: data.pop("measurement"),
        r"Run: unknown fields \[\], missing fields \['measurement'\]",
    ),
    "unknown field": (lambda data: data.update(colour="red"), r"Run: unknown fields \['colour'\]"),
    "missing field inside": (lambda data: data["plan"]["estimate"].pop("slowdown"), r"Run\.plan\.estimate.*slowdown"),
    "unknown field inside": (
        lambda data: data["plan"]["choices"][1].update(tier="disk"),
        r"Run\.plan\.choices\[1\].*tier",
    ),
    "number for a record": (
        lambda data: data.update(estimate=5),
        r"Run\.estimate is 5; wanted the fields of a Estimate",
    ),
    "list for a record": (lambda data: data.update(plan=[]), r"Run\.plan is \[\]"),
    "null for a record": (lambda data: data.update(measurement=None), r"Run\.measurement is None"),
    "number for a list": (lambda data: data["plan"].update(choices=3), r"Run\.plan\.choices is 3"),
    "record for a list": (
        lambda data: data["plan"].update(choices=data["plan"]["choices"][0]),
        r"Run\.plan\.choices is",
    ),
    "text for a list": (lambda data: data.update(script="train.py"), r"Run\.script is 'train.py'"),
    "list for a mapping": (lambda data: data["plan"].update(state_formats=["fp32"]), r"Run\.plan\.state_formats is"),
    "text for a number": (
        lambda data: data["plan"].update(budget_bytes="2GiB"),
        r"plan\.budget_bytes is '2GiB'; wanted int",
    ),
    "fraction for bytes": (
        lambda data: data["plan"].update(budget_bytes=1.5),
        r"plan\.budget_bytes is 1\.5; wanted int",
    ),
    "truth for a number": (
        lambda data: data["plan"].update(budget_bytes=True),
        r"plan\.budget_bytes is True; wanted int",
    ),
    "number for a truth": (lambda data: data["plan"].update(exact=1), r"plan\.exact is 1; wanted bool"),
    "number for text": (lambda data: data["plan"]["state_formats"].update(bias=4), r"plan\.state_formats\.bias is 4"),
    "text for a loss": (lambda data: data["measurement"]["losses"]["first"].append("x"), r"losses\.first\[2\] is 'x'"),
    "choice that nobody makes": (
        lambda data: data["plan"]["choices"][0].update(choice="recompte"),
        "the choice for 'blocks.0' is 'recompte'; wanted one of keep, recompute",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_record_is_refused_where_it_is_wrong_and_the_file_is_named(name: str, tmp_path: Path) -> None:
    change, complaint = WRONG[name]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(edited(change)), encoding="utf-8")
    with pytest.raises(ValueError, match=complaint) as caught:
        Run.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [[], 5, None, "plan", [{"kind": "plan"}]], ids=repr)
def test_what_is_no_mapping_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=f"kind '{type(data).__name__}'; wanted 'plan'"):
        Plan.from_dict(data)


TEXT = json.dumps(RUN.to_dict())
NOT_RECORDS = {
    "empty": (b"", "is not JSON"),
    "truncated": (TEXT[: len(TEXT) // 2].encode(), "is not JSON"),
    "last brace gone": (TEXT[:-1].encode(), "is not JSON"),
    "two records": ((TEXT + TEXT).encode(), "is not JSON"),
    "source code": (b"import torch\n", "is not JSON"),
    "binary": (bytes(range(256)), "is not JSON"),
    "list": (b"[1, 2]", "holds a list"),
    "number": (b"7", "holds a int"),
    "null": (b"null", "holds a NoneType"),
}


@pytest.mark.parametrize("name", NOT_RECORDS)
def test_a_file_that_is_no_record_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    content, complaint = NOT_RECORDS[name]
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        Run.load(path)
    assert str(path) in str(caught.value)
    assert "wanted a file that packlight wrote" in str(caught.value)


def test_a_file_that_is_not_there_is_the_system_s_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.json"))):
        Plan.load(tmp_path / "none.json")


# What a plan says of itself


def test_a_printed_plan_says_what_is_chosen_and_what_it_costs() -> None:
    printed = str(dataclasses.replace(PLAN, exact=True, notes=("the loss was guessed",)))
    for part in ("1.07 KiB on cpu (exact)", "1000 B", "1.46 KiB if nothing is changed", "0.5 s a step (1.25x)"):
        assert part in printed
    for part in (
        "1 of 2 recomputed: blocks.0",
        "fp32 for 1 parameter, paper4bit for 1 parameter",
        "at the peak (backward)",
        "parameters 400 B",
    ):
        assert part in printed
    assert "temporaries" not in printed
    assert printed.endswith("note: the loss was guessed")


def test_a_plan_s_recomputed_blocks_are_those_that_it_says() -> None:
    assert PLAN.recomputed() == {"blocks.0"}


def test_many_recomputed_blocks_are_printed_as_a_range() -> None:
    choices = tuple(Choice(f"blocks.{at}", "recompute", 1, 0.0) for at in range(9))
    assert "9 of 9 recomputed: blocks.0, blocks.1, ... blocks.8" in str(dataclasses.replace(PLAN, choices=choices))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "0.97x: states in few bits, as timed here, are stepped faster than others"),
        ({"state_formats": {"weight": "fp32"}, "num_microbatches": 2}, "0.97x: parts of a batch, timed alone"),
        ({"state_formats": {"weight": "as is"}}, "0.97x: as fast, to the noise of timing"),
    ],
)
def test_a_slowdown_below_one_is_explained(changes: dict[str, Any], why: str) -> None:
    faster = dataclasses.replace(PLAN, estimate=dataclasses.replace(ESTIMATE, slowdown=0.97), **changes)
    assert why in str(faster) and why in faster._repr_html_()
    as_fast = dataclasses.replace(faster, estimate=dataclasses.replace(ESTIMATE, slowdown=0.996))
    assert "(1.00x)" in str(as_fast)


# What a run says of itself

TOLD = dataclasses.replace(
    MEASUREMENT, predicted_peak_bytes=1000, step_seconds=0.25, predicted_step_seconds=0.5, notes=("<b> of notes",)
)


def test_a_printed_measurement_has_predictions_beside_what_happened() -> None:
    assert str(dataclasses.replace(TOLD, peak_by_category={"parameters": 900, "other": 90})).splitlines() == [
        "measured: peak 990 B (predicted 1000 B) in 2 of 2 steps, 0.25 s a step (predicted 0.5 s)",
        "  at the peak (forward): parameters 900 B, other 90 B",
        "  resident peak 4.88 KiB, optimiser states 200 B",
        "  loss: 2.5 at first, 2 at last",
        "  note: <b> of notes",
    ]


def test_what_a_measurement_does_not_know_it_leaves_out() -> None:
    bare = dataclasses.replace(MEASUREMENT, losses={"first": (), "last": ()})
    assert str(bare).splitlines() == [
        "measured: peak 990 B in 2 of 2 steps, - a step",
        "  resident peak 4.88 KiB, optimiser states 200 B",
    ]


def test_a_printed_run_has_its_plan_and_its_measurement() -> None:
    assert str(RUN) == f"run of train.py --steps 2\n{PLAN}\n{MEASUREMENT}"
    assert str(dataclasses.replace(RUN, plan=None)) == f"run of train.py --steps 2\n{MEASUREMENT}"


def test_a_notebook_shows_a_run_as_two_small_tables() -> None:
    shown = dataclasses.replace(RUN, measurement=TOLD)._repr_html_()
    assert shown.count("<table>") == 2 and "<b>" not in shown and "&lt;b&gt; of notes" in shown
    assert "<tr><th>peak</th><td>990 B (predicted 1000 B)</td></tr>" in shown
    assert TOLD._repr_html_() in shown and PLAN._repr_html_() in shown
