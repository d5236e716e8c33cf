"""Where commands write and speak: files that are checked before a script runs for hours, lines that name their rank."""

import importlib.util
import os
from pathlib import Path

import click

from packlight.serial import this_rank


def output_file(option: str, name: str | None) -> Path | None:
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


def page_file(option: str, name: str | None, *, other: Path | None = None, other_option: str = "") -> Path | None:
    """Refuse likewise a page that cannot be drawn, or that would take another file's place."""
    path = output_file(option, name)
    if path is not None and path == other:
        raise click.UsageError(f"{other_option} and {option} name the same file")
    if path is not None and importlib.util.find_spec("plotly") is None:
        raise click.UsageError(f"{option} draws with plotly, which is not installed; pip install 'packlight[report]'")
    return path


def say(message: str) -> None:
    """Tell the user on standard error, and of several processes which one tells."""
    rank = this_rank()
    click.echo(message if rank is None else f"[rank {rank}] {message}", err=True)
