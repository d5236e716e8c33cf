"""The `packlight` command: run, plan, explain and demo, on training scripts that nobody edits; convert, on checkpoints.

What packlight says of a run goes to standard error, so that a script's own output stays as it is. Exit status: the
script's own; 2 for wrong usage, 3 where no plan fits the budget (nothing was trained, nothing was written).
"""

import atexit
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import Progress

from packlight.budget import BudgetError, format_bytes, parse_bytes
from packlight.records import Plan, Run
from packlight.report import text

_TARGETS = ("4bit", "8bit", "fp8", "fp32", "torch", "deepspeed-universal", "dcp")
_SCRIPT = {"allow_interspersed_args": False}  # what follows the script is the script's


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="packlight")
def main() -> None:
    """Make a PyTorch training script fit a byte budget, and say before the run what to expect."""


def _script_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that `run` and `plan` share, and the script with its arguments."""
    decorators = [
        click.option("--exact", is_flag=True, help="Only choices that leave every loss and gradient bit-equal."),
        click.option(
            "--release-gradients",
            is_flag=True,
            help="Parameters may be stepped inside backward and gradients freed there: the script neither clips, "
            "accumulates nor reads them.",
        ),
        click.option("--host-budget", metavar="BYTES", help="Bytes of host memory that a GPU may use."),
        click.option("--disk", metavar="DIR", help="Folder on a disk where tensors may wait for backward."),
        click.option("-m", "module", is_flag=True, help="SCRIPT is the name of a module, as in python -m."),
        click.argument("script"),
        click.argument("arguments", nargs=-1, type=click.UNPROCESSED),
    ]
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


@main.command(context_settings=_SCRIPT)
@click.option("--budget", metavar="BYTES", help='Bytes allowed on the device: "16GiB", "800MB", "80%" or a number.')
@click.option("--plan", "plan_file", metavar="FILE", help="Carry out this saved plan instead of making one.")
@click.option("--record", metavar="FILE", help="Write what was planned and measured to this JSON file.")
@click.option("--measure-only", is_flag=True, help="Measure the script as it is; plan and change nothing.")
@click.option("--hardware", hidden=True)  # refused in words of its own
@_script_arguments
def run(*, script: str, arguments: tuple[str, ...], record: str | None, **options: Any) -> None:
    """Run SCRIPT under a plan that keeps its tensors within the budget."""
    target = _output_file("--record", record)
    outcome = _run(script, arguments, **options)
    if outcome.run is not None and target is not None:
        outcome.run.save(_of_rank(target))
    if outcome.message:
        _say(f"packlight: {outcome.message}")
    elif outcome.run is not None:
        _say(text.summary(outcome.run))
    _leave(outcome.exit_status)


@main.command(context_settings=_SCRIPT)
@click.option("--budget", metavar="BYTES", required=True, help='"16GiB", "800MB", "80%" or a number of bytes.')
@click.option("--save", metavar="FILE", help="Write the plan to this JSON file.")
@click.option("--hardware", metavar="NAME", help='Plan for this device ("h100-80g"), which need not be here.')
@click.option("--curve", metavar="N", type=click.IntRange(min=2), help="Tell the step time for N other budgets, too.")
@click.option("--world", metavar="N", type=click.IntRange(min=1), help="Plan for N ranks that share states.")
@click.option("--engine", type=click.Choice(["ddp", "zero", "fsdp"]), help="What shares them. Default: the fastest.")
@click.option("--link", metavar="BYTES", help='What a rank sends to the next in a second ("50GB").')
@_script_arguments
def plan(*, script: str, arguments: tuple[str, ...], save: str | None, **options: Any) -> None:
    """Stop SCRIPT before its first step, and print the plan."""
    plans: list[Plan] = []
    target = _output_file("--save", save)
    outcome = _run(script, arguments, stop_before_step=True, plans=plans, **options)
    if outcome.message:
        _say(f"packlight: {outcome.message}")
    if plans and outcome.exit_status == 0:
        text.show(plans[-1])
        if target is not None:
            plans[-1].save(_of_rank(target))
    _leave(outcome.exit_status)


@main.command()
@click.argument("file", metavar="RUN_OR_PLAN.json", type=click.Path(exists=True, dir_okay=False))
def explain(file: str) -> None:
    """Print a saved plan or run: what was chosen, what was expected, what happened."""
    try:
        text.show(text.read_record(file))
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@main.command()
@click.option("--model", required=True, help='A transformer by its shape ("llama-13b").')
@click.option("--ranks", "num_ranks", required=True, type=int, help="Ranks of the pipeline.")
@click.option("--chunks", "num_chunks", default=1, show_default=True, help="Stages of each rank.")
@click.option("--microbatches", "num_microbatches", required=True, type=int, help="Of a step.")
@click.option("--seq", "sequence_length", required=True, type=int, help="Tokens of a sequence.")
@click.option("--microbatch-size", default=1, show_default=True, help="Sequences of a microbatch.")
@click.option("--budget", metavar="BYTES", required=True, help="Bytes allowed on each rank's device.")
@click.option("--host-budget", metavar="BYTES", help="Bytes of host memory that each rank may use.")
@click.option("--hardware", metavar="NAME", help='Device of each rank ("a100-80g").')
@click.option("--k", type=float, help="Time to move a layer's activations out and back over that of its compute.")
@click.option("--tflops", type=float, help="Matrix rate that a rank reaches, in Tflop/s.")
@click.option("--keep-elementwise", is_flag=True, help="Norms, activations and dropout are not computed again.")
@click.option("--state-bytes", default=16, show_default=True, help="Of a parameter, with gradient and states.")
@click.option("--all", "every", is_flag=True, help="Print all candidates.")
@click.option("--save", metavar="FILE", help="Write the plan to this JSON file.")
@click.option("--html", metavar="FILE", help="Draw the chosen schedule on this page.")
def pipeline(
    *,
    budget: str,
    host_budget: str | None,
    tflops: float | None,
    keep_elementwise: bool,
    every: bool,
    save: str | None,
    html: str | None,
    **asked: Any,
) -> None:
    """Weigh pipeline schedules with offload for a transformer, and choose the fastest that fits."""
    from packlight.planner.pipelines import PipelineQuestion, plan_pipeline  # takes torch's second, as `run` does
    from packlight.report import pipeline as page

    target, drawn = _output_file("--save", save), _output_file("--html", html)
    if drawn is not None and drawn == target:
        raise click.UsageError("--save and --html name the same file")
    if drawn is not None and importlib.util.find_spec("plotly") is None:
        raise click.UsageError("--html draws with plotly, which is not installed; pip install 'packlight[report]'")
    flops = None if tflops is None else tflops * 1e12
    try:
        question = PipelineQuestion(**asked, flops_per_second=flops, recompute=not keep_elementwise)
        answer = plan_pipeline(question, budget=budget, host_budget=host_budget)
    except BudgetError as error:
        click.echo(f"packlight: {error}", err=True)
        sys.exit(3)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    page.show(answer.plan, answer.rows(every=every))
    if target is not None:
        answer.plan.save(target)
    if drawn is not None:
        page.write_page(drawn, answer.plan, answer.bars())


@main.command()
@click.argument("checkpoint")
@click.option("--to", "target", type=click.Choice(_TARGETS), required=True, help="What is wanted.")
@click.option("--model", metavar="FILE", help="The model's state dict, where CHECKPOINT lacks it.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, once the result is complete.")
@click.argument("out")
def convert(*, checkpoint: str, target: str, out: str, model: str | None, overwrite: bool) -> None:
    """Write the optimiser's states of CHECKPOINT in another format to OUT: all of it, or nothing."""
    from packlight import checkpoints  # takes torch's second

    console, before = Console(stderr=True), signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("converting", total=None)

    def tell(number: int, total: int) -> None:
        progress.update(task, completed=number, total=total)

    try:
        with progress:
            done = checkpoints.convert(checkpoint, target, out, model=model, overwrite=overwrite, tell=tell)
    except (checkpoints.CheckpointError, OSError) as error:
        click.echo(f"packlight: {error}", err=True)
        sys.exit(2 if isinstance(error, checkpoints.CheckpointError) else 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    for note in done.notes:
        click.echo(f"packlight: {note}", err=True)
    sizes = f"{format_bytes(done.states_before_bytes)} -> {format_bytes(done.states_after_bytes)}"
    click.echo(f"{out}: {done.num_tensors} tensors of {done.num_parameters} parameters' states, {sizes}")


@main.command()
@click.option("--budget", metavar="BYTES", help="Budget of the planned run. Default: half the plain run's peak.")
@click.option("--steps", default=14, show_default=True, help="Training steps of each run.")
@click.option("--record", metavar="FILE", help="Write the planned run's record to this JSON file.")
def demo(*, budget: str | None, steps: int, record: str | None) -> None:
    """Train a small byte-level language model on the standard library's sources, plain and planned."""
    console, target = Console(), _output_file("--record", record)
    with tempfile.TemporaryDirectory() as folder:
        plain, plain_loss = _demo_run(console, Path(folder), "plain", ["--measure-only"], steps=steps)
        budget = budget or str(plain.measurement.device_peak_bytes // 2)
        planned, planned_loss = _demo_run(console, Path(folder), "planned", ["--budget", budget], steps=steps)
        if target is not None:
            planned.save(target)
    losses = {"plain": plain_loss, "planned": planned_loss}
    console.print(text.comparison({"plain": plain, "planned": planned}, losses))


def _demo_run(console: Console, folder: Path, name: str, options: list[str], *, steps: int) -> tuple[Run, float]:
    """Run the demo's training script in a process of its own; return its record and its held-out loss."""
    script = Path(__file__).with_name("demo") / "train_gpt.py"
    record, result = folder / f"{name}.json", folder / f"{name}-result.json"
    console.print(f"[bold]{name}[/bold]")
    command = [sys.executable, "-m", "packlight", "run", *options, "--record", os.fspath(record), os.fspath(script)]
    done = subprocess.run([*command, "--steps", str(steps), "--result", os.fspath(result)], check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return Run.load(record), float(json.loads(result.read_text(encoding="utf-8"))["held_out_loss"])


def _output_file(option: str, name: str | None) -> Path | None:
    """Refuse a file that cannot be written before a script runs for hours, and keep its place: a script may chdir."""
    if name is None:
        return None
    path = Path(name).absolute()
    if path.is_dir():
        raise click.UsageError(f"{option} {name}: this is a folder; wanted a file to write")
    if not path.parent.is_dir():
        raise click.UsageError(f"{option} {name}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise click.UsageError(f"{option} {name}: the folder {path.parent} may not be written to")
    return path


def _rank() -> int | None:
    """Return which of several processes of torchrun this is; None for a process alone."""
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    return int(os.environ.get("RANK", "0")) if several else None


def _of_rank(path: Path) -> Path:
    """Return the file that a rank writes: the named one for the first, beside it NAME.rank1.json for the next."""
    rank = _rank()
    return path if not rank else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def _say(message: str) -> None:
    """Tell the user on standard error, and of several processes which one tells."""
    rank = _rank()
    click.echo(message if rank is None else f"[rank {rank}] {message}", err=True)


def _leave(exit_status: int) -> NoReturn:
    """End this process as the script ended: with its exit status, or by the signal that a negative one names."""
    if exit_status < 0:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        signal.signal(-exit_status, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_status)
    sys.exit(exit_status)


def _run(
    script: str,
    arguments: tuple[str, ...],
    *,
    budget: str | None,
    module: bool,
    exact: bool,
    host_budget: str | None,
    disk: str | None,
    **options: Any,
) -> Any:
    """Run a script under a session; errors of usage become click's."""
    from packlight.integrations.script import Settings, Target, run_script

    plan_file, measure_only = options.get("plan_file"), options.get("measure_only", False)
    if measure_only == (budget is not None or plan_file is not None):
        raise click.UsageError(
            "wanted --budget BYTES, --plan FILE (or both), or --measure-only alone, before the script: "
            "what stands after it is the script's own"
        )
    hardware, stops = options.get("hardware"), bool(options.get("stop_before_step"))
    if hardware is not None and not stops:
        raise click.UsageError(
            f"--hardware {hardware}: a run is on this machine; packlight plan --hardware makes a plan for another one"
        )
    plans: list[Plan] = options.get("plans", [])

    def tell(made: Plan, title: str) -> None:
        plans.append(made)
        if not stops:
            _say(f"packlight: {title}{made}")

    try:
        world = _world(options)
        _check_tiers(host_budget, disk)
        if measure_only and (host_budget is not None or disk is not None):
            raise ValueError("--measure-only moves nothing; leave --host-budget and --disk out")
        given = Plan.load(plan_file) if plan_file is not None else None
        if given is not None and given.tier == "disk" and disk is not None:
            given = replace(given, folder=os.path.abspath(disk))
        allowed = budget if budget is not None or given is None else given.budget_bytes
        settings = Settings(
            allowed,
            exact,
            given,
            stops,
            host_budget,
            None if disk is None else os.path.abspath(disk),
            tell,
            hardware,
            options.get("curve") or 0,
            bool(options.get("release_gradients")),
            world,
        )
        return run_script(Target(script, arguments, module), settings)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error


def _world(options: Mapping[str, Any]) -> Any:
    """Return the ranks that are asked for."""
    from packlight.planner.request import World

    num_ranks, engine, link = (options.get(name) for name in ("world", "engine", "link"))
    if num_ranks is None:
        if engine is not None or link is not None:
            raise ValueError("--engine and --link are of several ranks; say how many with --world N")
        return None
    if options.get("curve"):
        raise ValueError("--curve is of one rank; leave it or --world out")
    return World(num_ranks, engine, None if link is None else float(parse_bytes(link)))


def _check_tiers(host_budget: str | None, disk: str | None) -> None:
    """Refuse what cannot be used before the script runs."""
    if host_budget is not None:
        parse_bytes(host_budget)
    if disk is not None and not Path(disk).is_dir():
        raise ValueError(f"--disk {disk}: there is no such folder; make it, or name another")
