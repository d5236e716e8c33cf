"""`packlight run` and `packlight plan`: training scripts under a session."""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

from packlight.budget import parse_bytes
from packlight.cli.output import output_file, say
from packlight.records import Plan
from packlight.report import text
from packlight.serial import of_rank

DEFAULT_BUDGET = "90%"
"""Of a named device: what libraries and fragments of its allocator take comes on top of tensors."""

_SCRIPT = {"allow_interspersed_args": False}  # what follows the script is the script's


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


@click.command(context_settings=_SCRIPT)
@click.option("--budget", metavar="BYTES", help='Bytes allowed on the device: "16GiB", "800MB", "80%" or a number.')
@click.option("--plan", "plan_file", metavar="FILE", help="Carry out this saved plan instead of making one.")
@click.option("--record", metavar="FILE", help="Write what was planned and measured to this JSON file.")
@click.option("--measure-only", is_flag=True, help="Measure the script as it is; plan and change nothing.")
@click.option("--hardware", hidden=True)  # refused in words of its own
@_script_arguments
def run(*, script: str, arguments: tuple[str, ...], record: str | None, **options: Any) -> None:
    """Run SCRIPT under a plan that keeps its tensors within the budget."""
    target = output_file("--record", record)
    outcome = _run(script, arguments, **options)
    if outcome.run is not None and target is not None:
        outcome.run.save(of_rank(target))
    if outcome.message:
        say(f"packlight: {outcome.message}")
    elif outcome.run is not None:
        say(text.summary(outcome.run))
    _leave(outcome.exit_status)


@click.command(context_settings=_SCRIPT)
@click.option(
    "--budget", metavar="BYTES", help=f'"16GiB", "800MB", "80%" or a number. Default with --hardware: {DEFAULT_BUDGET}.'
)
@click.option("--all", "every", is_flag=True, help="List what is kept, too, and each parameter's state format.")
@click.option("--save", metavar="FILE", help="Write the plan to this JSON file.")
@click.option("--hardware", metavar="NAME", help='Plan for this device ("h100-80g"), which need not be here.')
@click.option("--curve", metavar="N", type=click.IntRange(min=2), help="Tell the step time for N other budgets, too.")
@click.option("--world", metavar="N", type=click.IntRange(min=1), help="Plan for N ranks that share states.")
@click.option("--engine", type=click.Choice(["ddp", "zero", "fsdp"]), help="What shares them. Default: the fastest.")
@click.option("--precision", type=click.Choice(["bf16", "fp16"]), help="Ranks use fp32 parameters in 16 bits.")
@click.option("--link", metavar="BYTES", help='What a rank sends to the next in a second ("50GB").')
@_script_arguments
def plan(*, script: str, arguments: tuple[str, ...], save: str | None, every: bool, **options: Any) -> None:
    """Stop SCRIPT before its first step, and print the plan."""
    plans: list[Plan] = []
    target = output_file("--save", save)
    options["budget"] = _budget_or_default(options["budget"], options["hardware"])
    outcome = _run(script, arguments, stop_before_step=True, plans=plans, **options)
    if outcome.message:
        say(f"packlight: {outcome.message}")
    if plans and outcome.exit_status == 0:
        text.show(plans[-1], is_short=not every)
        if target is not None:
            plans[-1].save(of_rank(target))
    _leave(outcome.exit_status)


def _budget_or_default(budget: str | None, hardware: str | None) -> str:
    """Return the budget that was given, or a share of the device that was named."""
    if budget is not None:
        return budget
    if hardware is None:
        raise click.UsageError('wanted --budget BYTES ("16GiB", "80%"), or --hardware NAME for the most of its memory')
    say(f"packlight: --budget was not given; it is {DEFAULT_BUDGET} of {hardware}")
    return DEFAULT_BUDGET


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
            say(f"packlight: {title}{made}")

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

    num_ranks, *others = (options.get(name) for name in ("world", "engine", "link", "precision"))
    engine, link, precision = others
    if num_ranks is None:
        if any(other is not None for other in others):
            raise ValueError("--engine, --link and --precision are of several ranks; say how many with --world N")
        return None
    if options.get("curve"):
        raise ValueError("--curve is of one rank; leave it or --world out")
    return World(num_ranks, engine, None if link is None else float(parse_bytes(link)), precision)


def _check_tiers(host_budget: str | None, disk: str | None) -> None:
    """Refuse what cannot be used before the script runs."""
    if host_budget is not None:
        parse_bytes(host_budget)
    if disk is not None and not Path(disk).is_dir():
        raise ValueError(f"--disk {disk}: there is no such folder; make it, or name another")
