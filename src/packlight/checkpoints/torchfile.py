"""Files of torch.save: read without memory, and with the checks that torch.load leaves out.

torch.load takes a file whose bytes were flipped: it does not look at the checksums that torch.save wrote. They are
looked at here, in a pass of its own, before a byte of a tensor is used. Tensors are mappings of the file.

Source: torch 2.13, torch/serialization.py.
"""

import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from packlight.checkpoints.refusal import CheckpointError, refused

CHUNK_BYTES = 2**20


def is_torch_file(path: Path) -> bool:
    """Tell whether a file is one of torch.save, as torch has written them since 1.6."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())


def read(path: Path, *, strangers: tuple[str, ...] = ()) -> Any:
    """Return what a file holds, its tensors as mappings of the file.

    Args:
        path: of a file that `is_torch_file`.
        strangers: beginnings of module names whose classes may be there, and are read as empty objects.

    Raises:
        CheckpointError: it is damaged, or has objects that are neither tensors nor plain data.
    """
    check_sums(path, str(path))
    with refused(str(path), RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError, OSError):
        try:
            with torch.serialization.safe_globals(_stand_ins(path, strangers)):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            first = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path}: it has objects beside tensors and plain data, which are not read because unpickling may run "
                f"any code ({first}). Save tensors, numbers, strings and containers only: optimizer.state_dict()."
            ) from error


def write(tree: Any, path: Path) -> None:
    """Write a new file, as torch.save does, and wait until it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("xb") as file:
        try:
            torch.save(tree, file)
        except RuntimeError as error:  # what torch's writer makes of a full disk
            raise OSError(f"{path.name} could not be written: {error.__context__ or error}") from error
        file.flush()
        os.fsync(file.fileno())


def check_sums(path: Any, place: str) -> None:
    """Raise where a zip file's parts do not have the sums that it says.

    Args:
        path: a path, or an open file.
        place: for the message.

    Raises:
        CheckpointError: a part is damaged, or cut off.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                with archive.open(item) as part:
                    while part.read(CHUNK_BYTES):
                        pass
    except (zipfile.BadZipFile, EOFError, OSError, zlib.error, NotImplementedError, ValueError) as error:
        said = str(error) or type(error).__name__
        raise CheckpointError(f"{place} is damaged: {said}. Take another copy.") from error


class _Stranger:
    """What stands for an object of a class that nothing is to be known of."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take nothing."""

    def __setstate__(self, state: Any) -> None:
        """Take nothing."""


def _stand_ins(path: Path, strangers: tuple[str, ...]) -> list[Any]:
    if not strangers:
        return []
    found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(_Stranger, name) for name in found if name.startswith(strangers)]
