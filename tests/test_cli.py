"""The command, as users start it: scripts run as under python, wrong usage runs nothing, unfit budgets train nothing.

What packlight must not disturb is compared with plain python in a process of its own; what a process of its own would
not show any better runs in this one.
"""

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from packlight.cli import main
from packlight.measurement import Measurement
from packlight.records import Choice, Estimate, Plan, Run

SCRIPTS = Path(__file__).parent / "scripts"
BAD = SCRIPTS / "bad"
AMPLE = "1GiB"
COLUMNS = "100"
SMALL_MODEL = [str(SCRIPTS / "flat_sequential.py"), "--batch", "512", "--depth", "6", "--width", "96", "--steps", "4"]

#: A training script that looks at everything that a way of starting it could change.
CURIOUS = """
import atexit, json, os, sys
import torch
from torch import nn
import beside

print(json.dumps({"argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path[0], "spec": repr(__spec__),
                  "main": sys.modules["__main__"].__file__, "beside": beside.__file__, "stdin": sys.stdin.read(),
                  "in folder": os.path.exists(os.path.join(os.getcwd(), "elsewhere")), "package": __package__}))
atexit.register(print, "at exit", sys.argv)
os.chdir("elsewhere")
torch.manual_seed(0)
model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(3):
    loss = model(torch.randn(64, 32)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step} loss {loss.item()!r}")
    sys.stderr.write("the script's own words\\n")
"""

#: Trains a step, then gets the signal that Ctrl-C sends.
INTERRUPTED = """
import atexit, signal
import torch

model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(2, 4)).sum().backward()
optimizer.step()
atexit.register(print, "at exit")
print("still in the buffer")
try:
    signal.raise_signal(signal.SIGINT)
except Exception:
    print("an interrupt is no Exception")
"""

FAILS_INSIDE_TORCH = """
import torch

model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
loss = model(torch.ones(2, 4)).sum()
loss.backward()
optimizer.step()
loss.backward()
"""


def start(arguments: Sequence[str], *, cwd: Path) -> subprocess.Popen[bytes]:
    """Start python on these arguments, with one thread: two run at a time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": COLUMNS}
    environment.pop("PYTHONUNBUFFERED", None)  # what is still in a buffer at the end counts
    pipe = subprocess.PIPE
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen[bytes], given: bytes = b"") -> subprocess.CompletedProcess[str]:
    try:
        output, errors = process.communicate(given, timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output.decode(), errors.decode())


def packlight(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return finish(start(["-m", "packlight", *arguments], cwd=cwd))


def plain_and_packlight(
    options: Sequence[str], script: Sequence[str], *, cwd: Path, given: bytes = b""
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """Run a script under plain python and under packlight at the same time."""
    plain = start(script, cwd=cwd)
    ours = start(["-m", "packlight", "run", *options, *script], cwd=cwd)
    return finish(plain, given), finish(ours, given)


def invoke(*arguments: str) -> Result:
    """Call the command in this process."""
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def digests(folder: Path) -> dict[str, str]:
    """The contents of all files in a folder, caches aside, by their paths."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(autouse=True, scope="module")
def leaves_scripts_alone() -> Iterator[None]:
    """No run may edit a script or write beside it."""
    before = digests(SCRIPTS)
    yield
    assert digests(SCRIPTS) == before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that are compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A script runs as under python


def test_a_script_sees_what_it_sees_under_python(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "scripts" / "curious.py").write_text(CURIOUS)
    (tmp_path / "scripts" / "beside.py").write_text("")
    (tmp_path / "beside.py").write_text("raise ImportError('not the folder where python was called')")
    before = digests(tmp_path)
    script = ["scripts/../scripts/curious.py", "--budget", "0", "-m", "--", "a b", "", "--help"]
    options = ["--budget", AMPLE, "--record", "run.json"]
    plain, ours = plain_and_packlight(options, script, cwd=tmp_path, given=b"line 1\nline 2\n")
    assert plain.returncode == ours.returncode == 0, ours.stderr
    assert json.loads(plain.stdout.splitlines()[0])["stdin"] == "line 1\nline 2\n"
    # What runs at exit sees the command line of the process, all else is equal to the byte.
    assert ours.stdout.splitlines()[:-1] == plain.stdout.splitlines()[:-1]
    assert ours.stdout.splitlines()[-1].startswith("at exit")
    assert ours.stderr.count("the script's own words\n") == plain.stderr.count("the script's own words\n") == 3
    # The record lies where packlight was called, though the script went elsewhere, and nothing else is new.
    run = Run.load(tmp_path / "run.json")
    assert run.script == tuple(script)
    assert run.measurement.num_steps == 3
    assert {**before, "run.json": digests(tmp_path)["run.json"]} == digests(tmp_path)


def test_a_script_s_error_is_printed_as_python_prints_it(tmp_path: Path) -> None:
    plain, ours = plain_and_packlight(
        ["--budget", AMPLE, "--record", "run.json"], [str(BAD / "raises.py")], cwd=tmp_path
    )
    assert plain.returncode == ours.returncode == 1
    assert ours.stdout == plain.stdout != ""
    assert plain.stderr.startswith("Traceback")
    assert plain.stderr in ours.stderr
    assert ours.stderr.count("Traceback") == 1
    assert Run.load(tmp_path / "run.json").measurement.num_steps == 1


def test_an_interrupt_ends_a_script_as_it_ends_python(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    options = ["--measure-only", "--record", "run.json"]
    plain, ours = plain_and_packlight(options, ["interrupted.py"], cwd=tmp_path)
    assert plain.returncode == ours.returncode == -signal.SIGINT
    assert ours.stdout == plain.stdout == "still in the buffer\nat exit\n"
    assert plain.stderr.startswith("Traceback") and plain.stderr in ours.stderr
    assert Run.load(tmp_path / "run.json").measurement.num_steps == 1


def test_an_error_inside_torch_shows_no_frame_of_packlight(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(FAILS_INSIDE_TORCH)
    result = invoke("run", "--measure-only", str(tmp_path / "twice.py"))
    assert result.exit_code == 1
    assert "Trying to backward through the graph a second time" in result.stderr
    assert "torch/_tensor.py" in result.stderr
    assert "packlight/" not in result.stderr[result.stderr.index("Traceback") :]


ENDS = {
    "syntax": "x = (\n",
    "import": "import nothing_of_this_name\n",
    "farewell": "raise SystemExit('goodbye')\n",
    "negative": "raise SystemExit(-1)\n",
    "large": "raise SystemExit(256 + 3)\n",
    "zero": "1 / 0\n",
    "chained": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise ValueError('chained') from error\n",
    "cancelled": "import asyncio\nraise asyncio.CancelledError('not an Exception')\n",
    "own hook": "import sys\nsys.excepthook = lambda *_: print('my own hook', file=sys.stderr)\n1 / 0\n",
}


@pytest.mark.parametrize("text", ENDS.values(), ids=ENDS)
def test_an_end_before_training_is_python_s_own(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back what a script replaces
    plain = finish(start(["script.py"], cwd=tmp_path))
    ours = invoke("run", "--budget", AMPLE, "script.py")
    assert (ours.exit_code, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert plain.returncode != 0


def test_a_missing_dependency_is_said_as_python_says_it() -> None:
    plain = finish(start([str(BAD / "raises_before_training.py")], cwd=SCRIPTS))
    ours = invoke("run", "--budget", AMPLE, str(BAD / "raises_before_training.py"))
    assert (ours.exit_code, ours.stdout, ours.stderr) == (1, "", plain.stderr)


def test_a_script_that_reads_its_arguments_prints_what_it_prints_under_python(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    script = ["reads_argv.py", "a", "--budget", "1"]
    plain = finish(start(script, cwd=BAD))
    monkeypatch.chdir(BAD)
    ours = invoke("run", "--budget", AMPLE, *script)
    assert (ours.exit_code, ours.stdout) == (0, plain.stdout), ours.stderr
    assert json.loads(plain.stdout.splitlines()[0])["argv"] == script


def test_a_script_leaves_by_its_own_exit_status(tmp_path: Path) -> None:
    result = invoke("run", "--measure-only", "--record", str(tmp_path / "run.json"), str(BAD / "exits_with_7.py"))
    assert result.exit_code == 7
    assert Run.load(tmp_path / "run.json").measurement.num_steps == 3
    assert Run.load(tmp_path / "run.json").plan is None


def test_a_module_is_run_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("")
    (tmp_path / "ours" / "said.py").write_text("import sys\nprint(sys.argv, sys.path[0], __name__, __package__)\n")
    monkeypatch.chdir(tmp_path)
    plain = finish(start(["-m", "ours.said", "-m", "x"], cwd=tmp_path))
    result = invoke("run", "--budget", AMPLE, "-m", "ours.said", "-m", "x")
    monkeypatch.delitem(sys.modules, "ours")
    assert result.stdout == plain.stdout != ""


# What packlight cannot plan for is said


@pytest.mark.parametrize(
    "options", [["run", "--budget", AMPLE], ["run", "--measure-only"], ["plan", "--budget", AMPLE]]
)
def test_a_script_without_a_step_is_told_so(options: list[str], tmp_path: Path) -> None:
    target = [{"run": "--record", "plan": "--save"}[options[0]], str(tmp_path / "out.json")]
    result = invoke(*options, *target, str(BAD / "never_trains.py"))
    assert result.exit_code == 2
    assert result.stdout.startswith("held-out loss")
    assert "ended without a training step" in result.stderr
    assert os.listdir(tmp_path) == []


def test_two_models_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    record = ["--record", str(tmp_path / "run.json")]
    result = invoke("run", "--budget", AMPLE, *record, str(BAD / "trains_two_models.py"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "two models" in result.stderr and "packlight.fit" in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_an_unknown_optimiser_is_counted_and_stays_as_it_is(tmp_path: Path, one_thread: None) -> None:
    plain = start([str(BAD / "unknown_optimizer.py")], cwd=tmp_path)
    record = ["--record", str(tmp_path / "run.json")]
    ours = invoke("run", "--budget", AMPLE, *record, str(BAD / "unknown_optimizer.py"))
    assert ours.exit_code == 0, ours.stderr
    assert ours.stdout == finish(plain).stdout
    run = Run.load(tmp_path / "run.json")
    assert run.plan is not None
    assert set(run.plan.state_formats.values()) == {"as is"}
    momentum_bytes = 4 * 6 * (2 * 64 + 64 * 256 + 256 + 256 * 64 + 64)
    assert run.measurement.state_bytes == momentum_bytes
    assert run.plan.estimate.peak_by_category["optimizer_states"] == momentum_bytes
    assert "optimiser states: as is" in ours.stderr


def test_an_unknown_optimiser_is_named() -> None:
    result = invoke("plan", "--budget", AMPLE, str(BAD / "unknown_optimizer.py"))
    assert "Lion" in result.stdout + result.stderr


def test_a_plan_for_another_model_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    choices = (Choice("no.such.block", "recompute", 1, 0.0),)
    dataclasses.replace(PLAN, choices=choices).save(tmp_path / "plan.json")
    result = invoke("run", "--plan", str(tmp_path / "plan.json"), str(BAD / "exits_with_7.py"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no.such.block" in result.stderr and "Traceback" not in result.stderr


# Wrong usage runs nothing


@pytest.fixture
def says_that_it_ran(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text("print('the script ran')\n")
    return str(tmp_path / "script.py")


ESTIMATE = Estimate(100, 0, 0.1, 1.0, 100, {"parameters": 100}, "backward")
PLAN = Plan("cpu", 1000, False, (Choice("0", "keep", 1, 0.0),), {"0.weight": "fp32"}, ESTIMATE, 100)
MEASUREMENT = Measurement(100, 0, None, 0, 0.1, 1, 1, {"first": (), "last": ()}, {"parameters": 100}, "backward", 0)
RUN = Run(("x.py",), PLAN, ESTIMATE, None, MEASUREMENT)


def assert_refused(result: Result, complaint: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.search(complaint, re.sub(r"\s+", " ", result.stderr)), result.stderr
    assert result.stderr.startswith("Usage: ") and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        ("", "budget '' cannot be read; wanted bytes"),
        ("lots", "budget 'lots' cannot be read"),
        ("12XB", "budget '12XB' cannot be read"),
        ("nan", "cannot be read"),
        ("inf", "cannot be read"),
        ("0", "budget '0' is 0 bytes; wanted more than 0"),
        ("0%", "wanted more than 0"),
        ("-5GiB", "budget '-5GiB' is -5368709120 bytes"),
        ("500TiB", "budget '500TiB' is 512000.00 GiB and the device has"),
        ("101%", "budget '101%' is .* and the device has"),
    ],
)
def test_a_wrong_budget_is_refused_before_the_script_runs(
    command: str, budget: str, complaint: str, says_that_it_ran: str
) -> None:
    assert_refused(invoke(command, "--budget", budget, says_that_it_ran), complaint)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "or --measure-only alone, before the script"),
        (["--budget", AMPLE, "--measure-only"], "measure-only alone"),
        (["--plan", "plan.json", "--measure-only"], "measure-only alone"),
        (["--bugdet", AMPLE], "No such option"),
        (
            ["--budget", AMPLE, "--record", "missing/run.json"],
            "--record missing/run.json: there is no folder .*/missing",
        ),
        (["--budget", AMPLE, "--record", "folder"], "--record folder: this is a folder"),
        (["--plan", "missing.json"], "missing.json"),
        (["--plan", "folder"], "folder"),
        (["--plan", "run.json"], "run.json: got a record of kind 'run'; wanted 'plan'"),
        (["--plan", "cut.json"], "cut.json is not JSON"),
        (["--plan", "list.json"], "list.json holds a list"),
        (["--plan", "script.py"], "script.py is not JSON"),
        (["--plan", "newer.json"], "schema 2 and this packlight reads 1"),
        (["--plan", "edited.json"], "is 'recompte'; wanted one of keep, recompute"),
        (["--budget", AMPLE, "--host-budget", "lots"], "budget 'lots' cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused_before_the_script_runs(
    options: list[str], complaint: str, says_that_it_ran: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    PLAN.save(tmp_path / "plan.json")
    RUN.save(tmp_path / "run.json")
    text = (tmp_path / "plan.json").read_text()
    for name, content in {
        "cut.json": text[:-20],
        "list.json": "[]",
        "newer.json": text.replace('"schema": 1', '"schema": 2'),
        "edited.json": text.replace('"keep"', '"recompte"'),
    }.items():
        (tmp_path / name).write_text(content)
    before = digests(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert_refused(invoke("run", *options, says_that_it_ran), complaint)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("script", ["missing.py", "."])
def test_a_missing_script_is_refused(
    command: str, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(invoke(command, "--budget", AMPLE, script), f"there is no script '{re.escape(script)}'")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["run", "--budget", AMPLE], "Missing argument 'SCRIPT'"),
        (["plan", "script.py"], 'wanted --budget BYTES .*"16GiB", "80%".*, or --hardware NAME'),
        (
            ["plan", "--budget", AMPLE, "--save", "missing/plan.json", "script.py"],
            "--save missing/plan.json: there is no",
        ),
        (["explain"], "Missing argument"),
        (["explain", "missing.json"], "missing.json"),
        (["explain", "script.py"], "script.py is not JSON"),
        (["demo", "--record", "missing/run.json"], "--record missing/run.json: there is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_of_any_command_is_refused(
    arguments: list[str], complaint: str, says_that_it_ran: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(invoke(*arguments), complaint)
    assert os.listdir(tmp_path) == ["script.py"]


def test_the_command_itself_ends_with_the_status_of_wrong_usage(tmp_path: Path) -> None:
    done = packlight("frobnicate", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ")


@pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["explain"], ["demo"]], ids=" ".join)
def test_every_command_explains_itself(command: list[str]) -> None:
    result = invoke(*command, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")


# A budget that nothing fits, and the least that something fits


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("refused")
    return packlight("run", "--budget", "100KiB", "--record", "run.json", *SMALL_MODEL, cwd=folder), folder


def test_where_nothing_fits_nothing_is_trained_and_nothing_written(
    refused: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = refused
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(
        r"packlight: no plan fits 100\.00 KiB \(102400 bytes\); the smallest budget that fits is \d+ bytes .*\n",
        done.stderr,
    )
    assert os.listdir(folder) == []


def test_the_smallest_budget_that_was_named_works(refused: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    found = re.search(r"fits is (\d+) bytes", refused[0].stderr)
    assert found is not None
    done = packlight("run", "--budget", found[1], "--record", "run.json", *SMALL_MODEL, cwd=refused[1])
    assert done.returncode == 0, done.stderr
    run = Run.load(refused[1] / "run.json")
    assert run.measurement.device_peak_bytes <= int(found[1])


# A plan for hardware that is not here

META_SCRIPT = """
import torch
from torch import nn

with torch.device("DEVICE"):
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])
    batch = torch.ones(256, 64)
optimizer = torch.optim.AdamW(model.parameters())
print("built")
model(batch).square().mean().backward()
print("went on")
"""


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_plan_for_named_hardware_stops_the_script_before_its_first_step(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(META_SCRIPT.replace("DEVICE", device))
    monkeypatch.chdir(tmp_path)
    result = invoke("plan", "--hardware", "t4", "--budget", "50%", "--save", "plan.json", "script.py")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("built\nplan for 7.25 GiB on t4: ") and "went on" not in result.stdout
    assert "t4 by its data sheet: nothing was measured" in result.stdout
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.hardware, plan.budget_bytes) == ("t4", int(14.5 * 2**30) // 2)


def test_without_a_budget_a_named_device_s_memory_is_planned_with_but_for_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text(META_SCRIPT.replace("DEVICE", "meta"))
    monkeypatch.chdir(tmp_path)
    result = invoke("plan", "--hardware", "t4", "script.py")
    assert result.exit_code == 0, result.stderr
    assert "packlight: --budget was not given; it is 90% of t4\n" in result.stderr
    assert result.stdout.startswith("built\nplan for 13.05 GiB on t4: ")
    assert "nothing is changed: " in result.stdout and "choices" not in result.stdout
    whole = invoke("plan", "--hardware", "t4", "--all", "script.py").stdout
    assert "choices" in whole and re.search(r"0-3\.0\.weight +│ fp32 +│ +4,096", whole)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["plan", "--hardware", "h100", "--budget", AMPLE], "'h100' is not known; wanted one of a100-40g, .*, t4"),
        (["plan", "--hardware", "t4", "--budget", "16GiB"], r"16\.00 GiB and the device has 14\.50 GiB"),
        (["run", "--hardware", "t4", "--budget", AMPLE], "--hardware t4: a run is on this machine; packlight plan"),
        (["run", "--hardware", "t4", "--measure-only"], "--hardware t4: a run is on this machine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_hardware_that_is_not_known_or_not_meant_is_refused_before_the_script_runs(
    arguments: list[str], complaint: str, says_that_it_ran: str
) -> None:
    assert_refused(invoke(*arguments, says_that_it_ran), complaint)


# A plan is saved, carried out and explained


def test_a_saved_plan_is_carried_out_within_its_estimate_and_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = packlight("plan", "--budget", "2600KiB", "--save", "plan.json", *SMALL_MODEL, cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "step 0" not in planned.stdout
    assert os.listdir(tmp_path) == ["plan.json"]
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.recomputed() or plan.site_choices()
    assert plan.estimate.device_peak_bytes <= 2600 * 1024 < plan.estimate.plain_peak_bytes
    assert str(plan) in planned.stdout

    done = packlight("run", "--plan", "plan.json", "--record", "run.json", *SMALL_MODEL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step ") == 4
    run = Run.load(tmp_path / "run.json")
    assert run.plan == plan and run.estimate == plan.estimate
    assert run.measurement.device_peak_bytes == pytest.approx(plan.estimate.device_peak_bytes, rel=0.05)

    monkeypatch.setenv("COLUMNS", COLUMNS)
    listed = invoke("explain", str(tmp_path / "plan.json")).stdout
    assert listed.startswith(f"{plan}\n") and "optimiser states" in listed.removeprefix(str(plan))
    explained = invoke("explain", str(tmp_path / "run.json")).stdout
    assert explained.startswith("run of ") and str(plan) in explained
    assert f"{run.measurement.device_peak_bytes / 2**20:.2f} MiB" in explained
    assert sorted(os.listdir(tmp_path)) == ["plan.json", "run.json"]
