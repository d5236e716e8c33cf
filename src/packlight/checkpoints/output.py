"""Where a result is written: beside its place under another name, and put there in one step when it is complete.

A job may be stopped at any moment, and a disk may be full. A half-written checkpoint under the right name is worse
than none, so there is never one:

    1 room is made sure of   2 written to a name of its own, in the same folder   3 read again, compared
    4 what was there before is set aside, and the result renamed   5 what was set aside is removed

An interrupt may come between any two operations. So what removes a folder is in place before the folder is, and first
puts back what was set aside where there is no result.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packlight.budget import format_bytes
from packlight.checkpoints.refusal import CheckpointError

SIGNS = (".metadata", "latest_universal", "latest", "zero")
"""What a folder has one of that is a checkpoint: others are not overwritten."""

BEFORE = "before"
"""In a lent folder: what was at the result's place."""


def check_place(source: Path, out: Path, *, overwrite: bool) -> None:
    """Raise where a result may not be written.

    Raises:
        CheckpointError: there is something already, it is the source or inside it, or there is no such folder.
    """
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise CheckpointError(f"{out} is {source}, in it, or around it; a place beside it was wanted")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"there is no folder {out.absolute().parent} to write {out.name} in; make it first")
    if not os.access(out.absolute().parent, os.W_OK):
        raise CheckpointError(f"the folder {out.absolute().parent} may not be written to")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise CheckpointError(f"{out} is there already; name another place, or add --overwrite to replace it")
    if out.is_symlink() or not (out.is_file() or out.is_dir()):
        raise CheckpointError(f"{out} is neither a file nor a folder itself, and is not replaced")
    if out.is_dir() and any(out.iterdir()) and not any((out / sign).exists() for sign in SIGNS):
        raise CheckpointError(f"{out} is a folder with something else than a checkpoint in it, and is not replaced")


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise where a disk has less room than so many bytes.

    Raises:
        CheckpointError: it has less.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder} has {format_bytes(free)} left, and {format_bytes(num_bytes)} are wanted for the result and what "
            "is kept on the disk meanwhile. Make room, or name a place on another disk."
        )


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Lend a name for a folder beside a place, to be made there; in the end it is removed, with all that is in it.

    What `put` set aside is put back first where nothing took its place; a folder from which it cannot be is kept.

    Yields:
        The name.
    """
    folder = out.absolute().parent / f".{out.name}-{secrets.token_hex(8)}.partial"
    try:
        yield folder
    finally:
        if (folder / BEFORE).exists() and not os.path.lexists(out):
            os.rename(folder / BEFORE, out)
        _remove(folder)


def put(made: Path, out: Path) -> None:
    """Move a complete result from a lent folder to its place, and what was there into the lent folder.

    Raises:
        OSError: it cannot be moved; what was there is put back as the folder is removed.
    """
    _to_disk(made)
    if out.is_dir():
        os.rename(out, made.parent / BEFORE)
    os.replace(made, out)
    _sync(out.absolute().parent)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:  # the rest, where an interrupt cut it short
        shutil.rmtree(folder, ignore_errors=True)


def _to_disk(made: Path) -> None:
    for folder, _, names in os.walk(made):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    _sync(made)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
