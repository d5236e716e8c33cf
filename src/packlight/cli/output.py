"""Where commands write and speak: files that are checked before a script runs for hours, lines that name their rank."""

import os
from pathlib import Path

import click


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


def _rank() -> int | None:
    """Return which of several processes of torchrun this is; None for a process alone."""
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    return int(os.environ.get("RANK", "0")) if several else None


def of_rank(path: Path) -> Path:
    """Return the file that a rank writes: the named one for the first, beside it NAME.rank1.json for the next."""
    rank = _rank()
    return path if not rank else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def say(message: str) -> None:
    """Tell the user on standard error, and of several processes which one tells."""
    rank = _rank()
    click.echo(message if rank is None else f"[rank {rank}] {message}", err=True)
