"""Unmodified scripts of several processes under `torchrun ... packlight run`: FSDP2 and DeepSpeed, over gloo."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from packlight.records import Run
from tests.torchrun import ENVIRONMENT, free_port

SCRIPTS = Path(__file__).parents[1] / "scripts"
NUM_RANKS = 2
CASES = {
    "fsdp2": ("fsdp2_gpt.py",),
    "zero2": ("deepspeed_gpt.py", "--stage", "2"),
    "zero3": ("deepspeed_gpt.py", "--stage", "3"),
}


def started(options: list[str], name: str) -> "subprocess.CompletedProcess[str]":
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS), "--master-port", str(free_port())]
    command = [sys.executable, *launcher, "-m", "packlight", "run", *options, *CASES[name]]
    return subprocess.run(
        command, cwd=SCRIPTS, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=400
    )


def packlight_run(options: list[str], name: str, folder: Path) -> tuple[list[Run], list[str]]:
    """Run a case; return each rank's record, and the lines that ranks printed of their losses."""
    folder.mkdir(exist_ok=True)
    done = started([*options, "--record", str(folder / "run.json")], name)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = [Run.load(folder / f"run{suffix}.json") for suffix in ("", *(f".rank{at}" for at in range(1, NUM_RANKS)))]
    return runs, sorted(re.findall(r"rank \d step \d loss [\d.]+", done.stdout))  # ranks write into each other's lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@cache
def plain(name: str, folder: Path) -> tuple[int, list[str]]:
    runs, losses = packlight_run(["--measure-only"], name, folder / name)
    return max(run.measurement.device_peak_bytes for run in runs), losses


def assert_fits_on_every_rank(runs: list[Run]) -> None:
    first = runs[0].plan
    for run in runs:
        assert run.plan is not None and run.estimate is not None and first is not None
        measured = run.measurement.device_peak_bytes
        assert measured <= run.plan.budget_bytes
        assert 0.98 * measured <= run.estimate.device_peak_bytes <= 1.06 * measured
        assert run.plan.choices == first.choices and run.plan.state_formats == first.state_formats


@pytest.mark.parametrize(
    "name", ["fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "fsdp2")]
)
def test_an_exact_plan_fits_on_every_rank_and_the_script_prints_the_same_bits(
    name: str, folder: Path, tmp_path: Path
) -> None:
    peak_bytes, losses = plain(name, folder)
    runs, planned = packlight_run(["--budget", str(peak_bytes * 3 // 4), "--exact"], name, tmp_path)
    assert_fits_on_every_rank(runs)
    assert runs[0].plan is not None and runs[0].plan.recomputed()
    assert len(planned) == 4 * NUM_RANKS and planned == losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "zero2"])
def test_a_lossy_plan_fits_half_the_budget_on_every_rank_and_learns_as_before(
    name: str, folder: Path, tmp_path: Path
) -> None:
    peak_bytes, losses = plain(name, folder)
    runs, planned = packlight_run(["--budget", str(peak_bytes * 6 // 10)], name, tmp_path)
    assert_fits_on_every_rank(runs)
    assert runs[0].plan is not None
    assert {"4bit", "8bit"} & set(runs[0].plan.state_formats.values())
    held = sum(run.measurement.state_bytes for run in runs)
    num_elements = sum(run.measurement.peak_by_category["parameters"] for run in runs) // 4
    assert held < 4 * num_elements  # less than half of fp32 moments
    for before, after in zip(losses, planned, strict=True):
        assert abs(float(before.split()[-1]) - float(after.split()[-1])) < 0.02


@pytest.mark.slow
def test_what_fits_no_rank_ends_all_of_them_before_a_step_and_names_the_smallest_budget() -> None:
    done = started(["--budget", "2MB"], "fsdp2")
    assert done.returncode != 0
    said = re.findall(r"\[rank (\d)\] packlight: no plan fits .* the smallest budget that fits is (\d+)", done.stderr)
    assert {rank for rank, _ in said} == {"0", "1"} and len({smallest for _, smallest in said}) == 1
    assert re.findall(r"exitcode  : (\d+)", done.stderr)[-1] == "3" and "loss" not in done.stdout
