"""Unmodified training scripts under `packlight run`, each in a process of its own, as users start them."""

import dataclasses
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from packlight.records import Run
from packlight.report.text import summary

PORTABLE = dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.float32)
SCRIPTS = Path(__file__).parents[1] / "scripts"
CASES = {
    "plain_gpt": ("plain_gpt.py", "--steps", "4"),
    "llama_transformers": ("llama_transformers.py", "--steps", "4"),
    "bert_accumulate": ("bert_accumulate.py", "--steps", "4", "--accumulate", "2", "--batch", "6"),
    "digits_convnet": ("digits_convnet.py", "--steps", "5"),
    "run_by_module_name": ("-m", "packaged.train", "--steps", "4"),
    "evaluate_and_save": ("evaluate_and_save.py", "--steps", "6"),
    "flat_sequential": ("flat_sequential.py", "--steps", "4"),
}
LOOPS = ("variable_length", "closure", "parts", "scaled_and_pickled")
CASES |= {name: (f"loops/{name}.py",) for name in LOOPS}
FEW = ("variable_length",)
"""Others of these kinds have tests of their own below, or as a Trainer's."""


def packlight_run(options: list[str], name: str, folder: Path) -> tuple[Run, str, str]:
    """Run a case under packlight; return its record, its output and what packlight said."""
    record = folder / f"{name}.json"
    script = (*CASES[name], "--out", str(folder / "checkpoint.pt")) if name == "evaluate_and_save" else CASES[name]
    done = subprocess.run(
        [sys.executable, "-m", "packlight", "run", *options, "--record", str(record), *script],
        cwd=SCRIPTS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Run.load(record), done.stdout, done.stderr


@cache
def _measured(name: str, folder: Path) -> tuple[Run, str]:
    """A case with nothing changed, run once for all tests."""
    run, output, _ = packlight_run(["--measure-only"], name, folder)
    return run, output


def _plain(name: str, folder: Path) -> tuple[int, str]:
    run, output = _measured(name, folder)
    return run.measurement.device_peak_bytes, output


@cache
def _without_packlight(script: str) -> str:
    """What a script prints under python alone."""
    done = subprocess.run(
        [sys.executable, script],
        cwd=SCRIPTS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


def held_out_loss(output: str) -> float:
    return float(re.findall(r"held-out loss (\S+)", output)[-1])


def assert_fits_as_predicted(run: Run) -> None:
    assert run.plan is not None and run.estimate is not None
    measured = run.measurement.device_peak_bytes
    assert measured <= run.plan.budget_bytes
    assert abs(run.estimate.device_peak_bytes - measured) <= 0.02 * measured
    assert run.measurement.num_measured_steps >= 3


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FEW)]
)
def test_at_three_quarters_of_its_peak_a_script_fits_and_prints_the_same_bits(
    name: str, plain_folder: Path, tmp_path: Path
) -> None:
    peak_bytes, plain_output = _plain(name, plain_folder)
    run, output, _ = packlight_run(["--budget", str(peak_bytes * 3 // 4), "--exact"], name, tmp_path)
    assert_fits_as_predicted(run)
    assert run.plan is not None and run.plan.recomputed()
    assert output == plain_output


DEEP = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*[nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(12)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5):
    loss = model(torch.randn(16, 128)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
"""


@pytest.mark.slow
def test_with_gradients_released_a_script_fits_a_budget_that_it_did_not_and_prints_the_same_bits(
    tmp_path: Path,
) -> None:
    (tmp_path / "deep.py").write_text(DEEP, encoding="utf-8")

    def run(*options: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "packlight", "run", *options, "deep.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    plain = run("--measure-only")
    refused = run("--budget", "1MB", "--exact", "--release-gradients")
    (least,) = re.findall(r"smallest budget that fits is (\d+) bytes", refused.stderr)
    assert refused.returncode == 3 and run("--budget", least, "--exact").returncode == 3
    released = run("--budget", least, "--exact", "--release-gradients", "--record", "run.json")
    assert released.returncode == 0, released.stderr
    record = Run.load(tmp_path / "run.json")
    assert record.plan is not None and record.plan.releases_gradients
    assert_fits_as_predicted(record)
    assert released.stdout == plain.stdout
    lossy = run("--budget", str(int(least) * 7 // 10), "--release-gradients", "--record", "lossy.json")
    assert lossy.returncode == 0, lossy.stderr
    record = Run.load(tmp_path / "lossy.json")
    assert record.plan is not None and record.plan.releases_gradients
    assert not {"8bit", "4bit"}.isdisjoint(record.plan.state_formats.values())
    assert_fits_as_predicted(record)


@pytest.mark.slow
def test_a_plan_that_is_made_in_the_midst_of_a_forward_counts_for_that_forward(
    plain_folder: Path, tmp_path: Path
) -> None:
    peak_bytes, _ = _plain("variable_length", plain_folder)
    run, _, told = packlight_run(["--budget", str(peak_bytes * 6 // 10)], "variable_length", tmp_path)
    assert_fits_as_predicted(run)
    assert run.plan is not None and run.plan.site_choices() and "for a larger batch" in told
    measured_bytes = run.measurement.plan_peak_bytes  # of the larger batch's own step, whose plan is the last
    assert measured_bytes is not None
    assert measured_bytes == pytest.approx(run.plan.estimate.device_peak_bytes, rel=0.02)


@pytest.mark.slow
def test_at_half_of_its_peak_the_gpt_fits_and_prints_the_same_bits(plain_folder: Path, tmp_path: Path) -> None:
    peak_bytes, plain_output = _plain("plain_gpt", plain_folder)
    run, output, _ = packlight_run(["--budget", str(peak_bytes // 2), "--exact"], "plain_gpt", tmp_path)
    assert_fits_as_predicted(run)
    assert output == plain_output


def test_below_what_recomputation_reaches_a_disk_takes_the_rest_and_the_bits_are_the_same(
    plain_folder: Path, tmp_path: Path
) -> None:
    peak_bytes, plain_output = _plain("digits_convnet", plain_folder)
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["--budget", str(peak_bytes * 40 // 100), "--exact", "--disk", str(folder)]
    run, output, _ = packlight_run(options, "digits_convnet", tmp_path)
    assert_fits_as_predicted(run)
    assert run.plan is not None and run.plan.tier == "disk"
    assert "offload" in {choice.choice for choice in run.plan.choices}
    assert output == plain_output and not list(folder.iterdir())
    moved_bytes = sum(choice.bytes for choice in run.plan.choices if choice.choice == "offload")
    measured = run.measurement
    assert moved_bytes <= measured.tier_peak_bytes <= 1.1 * moved_bytes  # blocks of the disk are rounded up
    assert min(measured.out_bytes_per_second, measured.in_bytes_per_second, run.plan.out_bytes_per_second) > 0
    assert "on the disk, moved there at" in summary(run)


@pytest.mark.slow
def test_below_what_eight_bits_reach_states_take_four(plain_folder: Path, tmp_path: Path) -> None:
    peak_bytes, plain_output = _plain("plain_gpt", plain_folder)
    run, output, _ = packlight_run(["--budget", str(peak_bytes * 26 // 100)], "plain_gpt", tmp_path)
    assert_fits_as_predicted(run)
    assert run.plan is not None and "4bit" in run.plan.state_formats.values()
    assert output != plain_output
    assert abs(held_out_loss(output) / held_out_loss(plain_output) - 1) < 0.03  # 4 steps: far from convergence


def test_a_budget_that_is_large_enough_changes_nothing(plain_folder: Path, tmp_path: Path) -> None:
    peak_bytes, plain_output = _plain("plain_gpt", plain_folder)
    run, output, _ = packlight_run(["--budget", str(2 * peak_bytes)], "plain_gpt", tmp_path)
    assert run.plan is not None and run.estimate is not None
    assert not run.plan.recomputed()
    assert run.estimate.slowdown == 1.0
    assert output == plain_output
    assert_fits_as_predicted(run)


def test_a_checkpoint_saved_under_four_bit_states_resumes_in_plain_torch(plain_folder: Path, tmp_path: Path) -> None:
    peak_bytes, plain_output = _plain("evaluate_and_save", plain_folder)
    run, _, _ = packlight_run(["--budget", str(peak_bytes * 3 // 4)], "evaluate_and_save", tmp_path)
    assert run.plan is not None
    edited = dataclasses.replace(run.plan, state_formats=dict.fromkeys(run.plan.state_formats, "4bit"))
    edited.save(tmp_path / "plan.json")
    run, output, told = packlight_run(["--plan", str(tmp_path / "plan.json")], "evaluate_and_save", tmp_path)
    assert output != plain_output
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    states = saved["optimizer"]["state"].values()
    assert all({name: state[name].dtype for name in state} == PORTABLE for state in states)
    assert run.measurement.state_bytes < sum(state["exp_avg"].nbytes for state in states)
    resume = ["evaluate_and_save.py", "--steps", "8", "--resume", str(tmp_path / "checkpoint.pt"), "--out"]
    done = subprocess.run([sys.executable, *resume, str(tmp_path / "end.pt")], cwd=SCRIPTS, check=False)
    assert done.returncode == 0, told


def test_gradients_and_losses_of_a_run_are_in_its_record(plain_folder: Path) -> None:
    run, output = _measured("plain_gpt", plain_folder)
    printed = [float(value) for value in re.findall(r"step \d+ loss (\S+)", output)]
    assert len(printed) == 4
    assert list(run.measurement.losses["first"]) == printed
    assert list(run.measurement.losses["last"]) == printed


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("forward", 1),
        *(pytest.param(*at, marks=pytest.mark.slow) for at in (("forward", 4), ("backward", 2), ("backward", 3))),
    ],
)
def test_a_script_whose_memory_runs_out_in_its_first_steps_prints_the_same_bits(
    where: str, call: int, tmp_path: Path
) -> None:
    CASES["memory_runs_out"] = ("memory_runs_out.py", "--where", where, "--call", str(call))
    run, output, told = packlight_run(["--budget", "12MiB", "--exact"], "memory_runs_out", tmp_path)
    assert output == _without_packlight("memory_runs_out.py")
    assert told.count(f"out of memory in {where} of step {(call + 1) // 2}") == 1
    assert run.measurement.plan_peak_bytes is not None and run.plan is not None
    assert run.measurement.plan_peak_bytes <= 1.02 * run.plan.estimate.device_peak_bytes


@pytest.mark.slow
def test_a_script_whose_memory_runs_out_later_ends_as_without_packlight(tmp_path: Path) -> None:
    script = ["memory_runs_out.py", "--where", "backward", "--call", "7"]
    command = [sys.executable, "-m", "packlight", "run", "--budget", "12MiB", *script]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "OutOfMemoryError: CUDA out of memory" in done.stderr
    assert (
        "out of memory in backward of step 4, where 2.00 GiB were asked for, under a plan for 12.00 MiB" in done.stderr
    )
    assert "The largest, at the peak of step" in done.stderr and "memory_runs_out.py:" in done.stderr
    assert "What would free most" in done.stderr and "a smaller budget, --budget" in done.stderr
