"""What a checkpoint is, found out by what is in it, and read as one tree of entries."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packlight.checkpoints import dcpfolder, partitions, torchfile, universal
from packlight.checkpoints.refusal import CheckpointError
from packlight.checkpoints.scratch import Scratch, stored_at
from packlight.checkpoints.states import States
from packlight.checkpoints.tree import Path as TreePath
from packlight.checkpoints.tree import at, models_in, optimizers_in, written

WANTED = (
    "a file of torch.save, a folder of torch.distributed.checkpoint (with .metadata), or a folder of DeepSpeed "
    "(zero_pp_rank_*_optim_states.pt, or zero/ of a universal one) was wanted"
)
# Source: safetensors 0.7, README: "Format".
_SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_SAFETENSORS_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
_LONGEST_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    Attributes:
        path: where it is.
        kind: "torch", "dcp", "deepspeed-universal" or "deepspeed" (as ranks wrote it).
    """

    path: Path
    kind: str

    @classmethod
    def of(cls, path: Path) -> "Source":
        """Return what a checkpoint is.

        Raises:
            CheckpointError: it is not there, or none of the kinds that can be read.
        """
        if not path.exists():
            raise CheckpointError(f"{path} is not there; {WANTED}")
        if torchfile.is_torch_file(path):
            return cls(path, "torch")
        if path.is_file():
            raise CheckpointError(f"{path} is {_what_file(path)}; {WANTED}")
        if dcpfolder.is_dcp_folder(path):
            return cls(path, "dcp")
        if universal.tag_folder(path) is not None:
            return cls(path, "deepspeed-universal")
        if partitions.tag_folder(path) is not None:
            return cls(path, "deepspeed")
        hint = " Name the file in it: optimizer.pt." if (path / "optimizer.pt").is_file() else ""
        raise CheckpointError(f"{path} is a folder of another kind; {WANTED}.{hint}")

    def nbytes(self) -> int:
        """Return the bytes of its files."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(each.stat().st_size for each in self.path.rglob("*") if each.is_file())

    def read(self, folder: Path) -> Any:
        """Return what is in it; tensors lie in its files, or in files in `folder`.

        Raises:
            CheckpointError: it cannot be read.
        """
        if self.kind == "torch":
            return torchfile.read(self.path)
        if self.kind == "dcp":
            return dcpfolder.read(self.path, Scratch(folder))
        if self.kind == "deepspeed-universal":
            return universal.read(self.path)
        partitions.to_universal(self.path, folder / "universal")
        return universal.read(folder / "universal")

    def optimizer_path(self, tree: Any) -> TreePath:
        """Return where the optimiser is.

        Raises:
            CheckpointError: there is none, or there are several.
        """
        found = list(optimizers_in(tree))
        if len(found) == 1:
            return found[0]
        if not found:
            keys = ", ".join(map(str, list(tree)[:8])) if isinstance(tree, Mapping) else type(tree).__name__
            raise CheckpointError(
                f"{self.path} has no optimiser: nothing in it has 'state' and 'param_groups'. It has {keys}."
            )
        raise CheckpointError(
            f"{self.path} has {len(found)} optimisers, at {', '.join(map(written, found))}; one was wanted. Save them "
            "to a file each."
        )


def model_in(tree: Any, states: States) -> Mapping[str, Tensor] | None:
    """Return the model's state dict beside an optimiser: the first that has all its names; None where there is none."""
    names = {each.name for each in states.parameters}
    for path in models_in(tree):
        model: Mapping[str, Tensor] = at(tree, path)
        if names == {None} or names <= model.keys():
            return model
    return None


def read_model(path: Path) -> Mapping[str, Tensor]:
    """Return the model's state dict that a file holds, of torch.save or safetensors; its tensors lie in the file.

    Raises:
        CheckpointError: it holds none.
    """
    if torchfile.is_torch_file(path):
        tree = torchfile.read(path)
        first = next(models_in(tree), None)
        if first is None:
            raise CheckpointError(f"--model {path}: no model's state dict is in it: nothing has names and tensors only")
        found: Mapping[str, Tensor] = at(tree, first)
        return found
    if path.is_file() and path.suffix == ".safetensors":
        return _safetensors(path)
    raise CheckpointError(f"--model {path}: a file of torch.save or safetensors with the model's state dict was wanted")


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file: a length, a header in JSON, and then their bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER_BYTES):
            raise CheckpointError(f"--model {path} is no safetensors file, or is cut off")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"--model {path} has no header that can be read: {error}") from error
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    made = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + each for each in entry["data_offsets"])
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None or stop > size:
            raise CheckpointError(f"--model {path}: {name} is of {entry['dtype']}, or cut off")
        part = stored_at(storage[start:stop], (stop - start,), torch.uint8)
        if start % dtype.itemsize:  # its bytes lie as no number of that dtype may
            part = part.clone()
        made[name] = part.view(dtype).view(entry["shape"])
    return made


def _what_file(path: Path) -> str:
    with path.open("rb") as file:
        first = file.read(4)
    if first == b"PK\x03\x04":
        return "cut off: a zip file without its end"
    if first[:1] == b"\x80":
        return "of torch before 1.6, or a plain pickle; load it there and torch.save it again"
    return "a file of another kind"
