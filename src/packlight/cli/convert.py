"""`packlight convert`: an optimiser's states in another format."""

import signal
import sys

import click
from rich.console import Console
from rich.progress import Progress

from packlight.budget import format_bytes

TARGETS = ("4bit", "8bit", "fp8", "fp32", "torch", "deepspeed-universal", "dcp")
"""What `packlight.checkpoints` writes; written out here, since torch takes a second to be imported."""


@click.command()
@click.argument("checkpoint")
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="What is wanted.")
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
