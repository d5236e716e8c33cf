"""Folders of torch.distributed.checkpoint, read and written by one process.

The library loads into tensors that are there; here they are mappings of files, so that one chunk is in memory at a
time. Before it reads, every chunk is looked for, and held against its checksum: a missing or shortened file would
otherwise be an error deep inside, and flipped bytes would be none. `.metadata` and entries that are not tensors are
pickles, which could run any code; only the classes that the library writes are let in.

Source: torch 2.13, torch/distributed/checkpoint/filesystem.py, default_planner.py.
"""

import io
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from packlight.checkpoints.refusal import CheckpointError, refused
from packlight.checkpoints.scratch import Scratch
from packlight.checkpoints.torchfile import check_sums

METADATA = ".metadata"

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}


def is_dcp_folder(path: Path) -> bool:
    """Tell whether a folder is one of torch.distributed.checkpoint."""
    return (path / METADATA).is_file()


def read(path: Path, scratch: Scratch) -> Any:
    """Return what a folder holds, nested as it was saved, its tensors in files of `scratch`.

    Raises:
        CheckpointError: a chunk is missing or damaged, or an entry is neither a tensor nor plain data.
    """
    reader = _Reader(path)
    metadata = reader.read_metadata()
    _check_chunks(path, metadata)
    flat = {key: _place_for(each, scratch) for key, each in metadata.state_dict_metadata.items()}
    with refused(str(path), Exception, CheckpointException), _alone():
        state_dict_loader.load(
            flat,
            storage_reader=reader,
            planner=_Planner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    return _nested(flat, metadata.planner_data or {})


def write(tree: Any, path: Path) -> None:
    """Write a new folder, and wait until it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    with _alone(), _as_os_error(path):
        state_dict_saver.save(tree, storage_writer=FileSystemWriter(path, sync_files=True), no_dist=True)


def source_bytes(path: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


class _Reader(FileSystemReader):
    """The library's, with a `.metadata` that is read once, and runs no code."""

    _known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._known is None:
            place = Path(self.path) / METADATA
            with refused(str(place), Exception):
                found = _Unpickler(io.BytesIO(place.read_bytes())).load()
                if not isinstance(found, Metadata):
                    raise CheckpointError(f"{place} holds a {type(found).__name__}, torch's Metadata was wanted")
            found.storage_meta = None
            self._known = found
        return self._known


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES or (module, name) in _NAMES or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it has a {module}.{name}, which torch.distributed.checkpoint does not write")


_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take an entry that is no tensor, if it is plain data."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _place_for(entry: Any, scratch: Scratch) -> Any:
    if isinstance(entry, TensorStorageMetadata):
        return scratch.empty(entry.size, entry.properties.dtype)
    assert isinstance(entry, BytesStorageMetadata)
    return io.BytesIO()


def _check_chunks(path: Path, metadata: Metadata) -> None:
    """Raise where a chunk of an entry is not there, or damaged."""
    stored = metadata.storage_data or {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            covered = sum(torch.Size(chunk.sizes).numel() for chunk in entry.chunks)
            if covered != torch.Size(entry.size).numel():
                raise CheckpointError(
                    f"{path}: {key} has {covered} elements in its chunks, {torch.Size(entry.size).numel()} were wanted"
                )
    for index, info in stored.items():
        file, place = path / info.relative_path, f"{path}: {index.fqn} in {info.relative_path}"
        if not file.is_file():
            raise CheckpointError(f"{path}: {info.relative_path} is missing, {index.fqn} is in it. Copy all files.")
        if info.offset + info.length > file.stat().st_size:
            raise CheckpointError(
                f"{place} is cut off: the file ends at {file.stat().st_size} bytes, {index.fqn} is "
                f"at {info.offset} to {info.offset + info.length}. Take another copy."
            )
        with file.open("rb") as opened:
            part = _Part(opened, info.offset, info.length)
            if part.starts_like_a_zip():
                check_sums(part, place)


class _Part(io.RawIOBase):
    """A stretch of an open file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._start + self._at)
        wanted = max(0, min(len(buffer), self._length - self._at))
        got = self._file.readinto(memoryview(buffer)[:wanted])
        self._at += got
        return got

    def starts_like_a_zip(self) -> bool:
        first = self.read(4)
        self.seek(0)
        return first == b"PK\x03\x04"


def _nested(flat: dict[str, Any], paths: dict[str, Any]) -> Any:
    """Put entries where they were: a path's numbers are places in a list."""
    root: dict[Any, Any] = {}
    for key, value in flat.items():
        steps = paths.get(key, (key,))
        inner = root
        for step in steps[:-1]:
            inner = inner.setdefault(step, {})
        inner[steps[-1]] = value
    return _with_lists(root)


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    made = {key: _with_lists(value) for key, value in tree.items()}
    if made and all(isinstance(key, int) for key in made) and sorted(made) == list(range(len(made))):
        return [made[at] for at in range(len(made))]
    return made


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Raise what the library makes of a full disk as an error of the system."""
    try:
        yield
    except (RuntimeError, CheckpointException) as error:
        causes = getattr(error, "failures", {})
        first = next((each[0] for each in causes.values()), error)
        raise OSError(f"{path.name} could not be written: {first.__context__ or first}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """Leave out the library's warning that it works in one process, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
