"""Pipelines for named models and hardware: the published condition for copies, budgets that hold, plain refusals."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from packlight import BudgetError, Plan
from packlight.budget import format_bytes
from packlight.cli import main
from packlight.pipeline import read, shapes
from packlight.pipeline.schedule import ScheduleError
from packlight.pipeline.shapes import Shape, parameters_of, shape_named
from packlight.planner.known_hardware import KNOWN
from packlight.planner.pipelines import PipelineAnswer, PipelineQuestion, plan_pipeline
from packlight.report.pipeline import MAX_BARS, write_page
from packlight.schedules import Bar

pytestmark = pytest.mark.usefixtures("seed")

QUESTION = PipelineQuestion("llama-13b", 8, 4, 32, 16384, hardware="a100-80g")
COMMAND = "pipeline --ranks 8 --chunks 4 --microbatches 32 --hardware a100-80g --model llama-13b --seq 16384".split()
# Wan et al., "PipeOffload" (arXiv 2503.01328), figure 1: k by width and sequence length.
K = {
    (4096, 4096): 1.70,
    (4096, 8192): 1.46,
    (4096, 16384): 1.15,
    (4096, 32768): 0.80,
    (8192, 4096): 0.92,
    (8192, 8192): 0.84,
    (8192, 16384): 0.72,
    (8192, 32768): 0.56,
    (10240, 4096): 0.74,
    (10240, 8192): 0.69,
    (10240, 16384): 0.61,
    (10240, 32768): 0.49,
}


def k_of(answer: PipelineAnswer) -> float:
    (told,) = (re.match(r"k is ([\d.]+):", note) for note in answer.plan.notes if note.startswith("k is"))
    assert told is not None
    return float(told[1])


@pytest.mark.parametrize(("hidden", "length"), K)
def test_k_on_an_a100_is_that_of_the_paper(hidden: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape("gpt", 2, hidden, hidden // 128, hidden // 128, 4 * hidden, 1, is_gated=False, has_dropout=True)
    monkeypatch.setitem(shapes.SHAPES, "gpt", shape)
    question = PipelineQuestion("gpt", 2, 1, 4, length, hardware="a100-80g")
    k = k_of(plan_pipeline(question, budget="79GiB"))
    assert k == pytest.approx(10 / (3 * (6 * hidden + length)) * 220e12 / 15e9, abs=0.01)  # its formula
    assert k == pytest.approx(K[hidden, length], abs=0.06)  # its table, which is lower where sequences are long


def test_the_fastest_that_fits_is_chosen_at_every_budget() -> None:
    whole = plan_pipeline(QUESTION, budget="100%")
    rows = whole.rows(every=True)
    for row in rows:
        if row.peak_bytes > whole.plan.budget_bytes:
            continue
        answer = plan_pipeline(QUESTION, budget=row.peak_bytes)
        plan = answer.plan
        assert plan.estimate.device_peak_bytes <= row.peak_bytes
        fitting = [each for each in rows if each.peak_bytes <= row.peak_bytes]
        assert plan.estimate.step_seconds == min(each.step_seconds for each in fitting)
        assert [each.is_chosen for each in answer.rows()].count(True) == 1
    least = min(row.peak_bytes for row in rows)
    assert whole.plan.smallest_budget_bytes == least
    with pytest.raises(BudgetError) as refused:
        plan_pipeline(QUESTION, budget=least - 1)
    assert refused.value.smallest_bytes == least


def test_a_budget_of_the_host_that_binds_leaves_more_on_the_device() -> None:
    free = plan_pipeline(QUESTION, budget="50GiB").plan
    assert free.estimate.host_peak_bytes > 60 * 2**30
    with pytest.raises(BudgetError):
        plan_pipeline(QUESTION, budget="50GiB", host_budget="1GiB")
    bound = plan_pipeline(QUESTION, budget="79GiB", host_budget="30GiB").plan
    assert bound.estimate.host_peak_bytes <= 30 * 2**30
    least = plan_pipeline(QUESTION, budget=bound.smallest_budget_bytes, host_budget="30GiB").plan
    assert least.smallest_budget_bytes == bound.smallest_budget_bytes > free.smallest_budget_bytes


def test_a_row_says_what_its_schedule_takes() -> None:
    answer = plan_pipeline(QUESTION, budget="79GiB")
    plan, (row,) = answer.plan, [each for each in answer.rows() if each.is_chosen]
    assert plan.pipeline is not None
    assert row.tokens_per_second == pytest.approx(32 * 16384 / row.step_seconds)
    assert (row.peak_bytes, row.step_seconds) == (plan.estimate.device_peak_bytes, plan.estimate.step_seconds)
    assert row.host_bytes == max(plan.pipeline.hosts_bytes) == plan.estimate.host_peak_bytes > 0
    assert plan.estimate.slowdown == pytest.approx(row.step_seconds / answer.found[0].seconds)
    assert plan.out_bytes_per_second == plan.in_bytes_per_second == KNOWN["a100-80g"].duplex_bytes_per_second
    for name, lane in (("OFFLOAD", "out"), ("RELOAD", "back")):
        assert {bar.lane for bar in answer.bars() if bar.kind == name} == {lane}
    out = {(bar.rank, bar.stage, bar.microbatch): bar.end for bar in answer.bars() if bar.lane == "out"}
    assert out and all(
        out[bar.rank, bar.stage, bar.microbatch] < bar.start for bar in answer.bars() if bar.lane == "back"
    )
    parameters = parameters_of(shape_named("llama-13b"), 8, 4)
    twice = plan_pipeline(dataclasses.replace(QUESTION, state_bytes=17), budget="79GiB").found
    for one, other in zip(answer.found, twice, strict=True):
        grown = [b - a for a, b in zip(one.peaks_bytes, other.peaks_bytes, strict=True)]
        assert grown == list(parameters)


def test_devices_without_bf16_compute_in_fp16() -> None:
    question = dataclasses.replace(QUESTION, model="llama-7b", hardware="v100-32g", num_chunks=4, sequence_length=2048)
    answer = plan_pipeline(question, budget="31GiB")
    assert k_of(answer) > 1


def test_a_given_k_and_rate_need_no_hardware_and_slow_copies_leave_more_on_the_device() -> None:
    peaks = []
    for k in (0.1, 1.0, 4.0):
        question = dataclasses.replace(QUESTION, hardware=None, k=k, flops_per_second=2e14)
        answer = plan_pipeline(question, budget=2**42)
        assert k_of(answer) == pytest.approx(k, abs=0.005)
        peaks.append(min(row.peak_bytes for row in answer.rows(every=True)))
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]


def test_a_plan_is_a_record_and_says_what_the_ranks_do(tmp_path: Path) -> None:
    plan = plan_pipeline(QUESTION, budget="60GiB").plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.pipeline is not None and len(plan.choices) == 32
    moved = [choice.group for choice in plan.choices if choice.choice == "offload"]
    assert moved == [f"stage {stage}" for stage in range(8 * plan.pipeline.num_moved)]
    assert (
        max(plan.pipeline.peaks_bytes)
        == plan.estimate.device_peak_bytes
        == sum(plan.estimate.peak_by_category.values())
    )
    assert plan.pipeline.told(plan.tier) in str(plan)
    shown = CliRunner().invoke(main, ["explain", str(tmp_path / "plan.json")])
    assert shown.exit_code == 0 and "goes to the tier" in shown.output
    assert all(format_bytes(each) in shown.output for each in plan.pipeline.peaks_bytes)
    assert read(plan.pipeline).name == plan.pipeline.schedule
    assert any(
        re.match(r"copies out keep a rank's link busy for \d+% of a step, copies back", each) for each in plan.notes
    )


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"num_microbatches": 9, "num_chunks": 5}, None, ""),  # some group sizes divide evenly enough
        ({"num_chunks": 6}, ScheduleError, "48 stages came for the 40 layers of llama-13b.*at most 5 chunks a rank"),
        ({"num_ranks": 41, "num_chunks": 1}, ScheduleError, "at most 40 ranks"),
        ({"num_ranks": 0}, ScheduleError, "0 ranks came; wanted 1 or more"),
        ({"num_chunks": 0}, ScheduleError, "0 chunks came"),
        ({"num_microbatches": 0}, ScheduleError, "0 microbatches came"),
        ({"hardware": None}, ValueError, r"k \(--k\) is not known.*one of a100-40g"),
        ({"hardware": None, "k": 1.0}, ValueError, r"flops_per_second \(--tflops\) is not known"),
        ({"k": -1.0}, ValueError, "k=-1.0 came; wanted more than 0"),
        ({"flops_per_second": 0.0}, ValueError, "a rate of 0.0 operations a second came"),
        ({"hardware": "a100"}, ValueError, "'a100' is not known; wanted one of a100-40g"),
        ({"model": "llama"}, ValueError, "'llama' is not known; wanted one of llama-7b"),
        ({"sequence_length": -1}, ScheduleError, "a sequence length of -1 came"),
        ({"flops_per_second": float("inf")}, ValueError, "a rate of inf operations"),
        ({"k": float("inf")}, ValueError, "k=inf came"),
        ({"sequence_length": 10**20}, ValueError, "tokens came; wanted at most"),
        ({"state_bytes": -1}, ValueError, "-1 bytes of a parameter came"),
    ],
)
def test_bad_input_is_refused_with_what_would_do(
    changed: dict[str, Any], kind: type[ValueError] | None, said: str
) -> None:
    question = dataclasses.replace(QUESTION, **changed)
    if kind is None:
        plan_pipeline(question, budget="79GiB")
        return
    with pytest.raises(kind, match=said):
        plan_pipeline(question, budget="79GiB")


def test_the_command_prints_saves_and_draws(tmp_path: Path) -> None:
    files = {"--save": tmp_path / "plan.json", "--html": tmp_path / "page.html"}
    options = [item for option, path in files.items() for item in (option, str(path))]
    done = CliRunner().invoke(main, [*COMMAND, "--budget", "80GiB", *options])
    assert done.exit_code == 0, done.output
    plan = Plan.load(files["--save"])
    assert plan.pipeline is not None and plan.pipeline.schedule in done.output and "chosen" in done.output
    assert any("more than the 79.10 GiB that a100-80g has" in note for note in plan.notes)
    page = files["--html"].read_text(encoding="utf-8")
    assert all(f"rank {rank}" in page for rank in range(8)) and "out 7" in page and 'src="http' not in page
    every = CliRunner().invoke(main, [*COMMAND, "--budget", "80GiB", "--all"])
    assert every.output.count("GIS-6") > done.output.count("GIS-6")


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--budget", "20GiB"], 3, "the smallest budget that fits is"),
        (["--budget", "lots"], 2, "wanted bytes"),
        (["--budget", "70GiB", "--chunks", "9"], 2, "at most 5 chunks a rank"),
        (["--budget", "70GiB", "--host-budget", "some"], 2, "wanted bytes"),
        (["--budget", "70GiB", "--save", "nowhere/plan.json"], 2, "nowhere"),
    ],
)
def test_the_command_refuses_and_writes_nothing(options: list[str], status: int, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = CliRunner().invoke(main, [*COMMAND, *options, "--html", str(page)])
    assert done.exit_code == status and said in " ".join(done.output.split())
    assert not page.exists()


def test_a_pipeline_s_plan_is_not_carried_out_on_one_model(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_pipeline(QUESTION, budget="60GiB").plan.save(path)
    script = Path(__file__).parents[1] / "scripts" / "digits_convnet.py"
    done = CliRunner().invoke(main, ["run", "--plan", str(path), str(script)])
    assert done.exit_code == 2 and "pipeline" in done.output


def test_of_a_long_step_the_beginning_is_drawn(tmp_path: Path) -> None:
    bars = [Bar(0, "compute", "F", 0, at, at / 1000, at / 1000 + 0.5) for at in range(2 * MAX_BARS)]
    plan = plan_pipeline(QUESTION, budget="60GiB").plan
    write_page(tmp_path / "page.html", plan, bars)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "; the first 20 s of 40.5</p>" in page
