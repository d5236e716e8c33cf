"""Tensors that lie in files without a name, so that a checkpoint is never in memory as a whole.

torch.save and torch.distributed.checkpoint want all tensors at once. A tensor that is a shared mapping of a file costs
no memory of its own: the system writes its pages out and drops them as it needs to. The file is in the folder of the
result, where there is room for tensors anyway; it has no name, so it ends with the process that made it, however that
ends. Its blocks are asked for beforehand: a disk that is full is an error then, and not a signal later.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEGMENT_BYTES = 32 * 2**20
"""Small tensors share a file of this size; the number of a process's mappings is limited."""

ALIGNMENT_BYTES = 64


class Scratch:
    """Makes such tensors; a file goes when the last of its tensors does."""

    def __init__(self, folder: Path) -> None:
        """Make them in a folder."""
        self._folder = folder
        self._segment: Any = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor in a file, of zeros at first.

        Raises:
            OSError: the disk is full.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(tuple(shape), dtype=dtype)
        storage = self._file(num_bytes) if num_bytes > SEGMENT_BYTES // 4 else self._share(num_bytes)
        return stored_at(storage, shape, dtype)

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor in a file."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def _share(self, num_bytes: int) -> Any:
        start = -(-self._used // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if self._segment is None or start + num_bytes > SEGMENT_BYTES:
            self._segment, start = self._file(SEGMENT_BYTES), 0
        self._used = start + num_bytes
        return self._segment[start : start + num_bytes]

    def _file(self, num_bytes: int) -> Any:
        descriptor, name = tempfile.mkstemp(prefix=".packlight-", dir=self._folder)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
            return torch.UntypedStorage.from_file(name, shared=True, nbytes=num_bytes)
        finally:
            os.unlink(name)
            os.close(descriptor)


def stored_at(storage: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the contiguous tensor whose bytes a storage is."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    tensor: Tensor = torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), strides)
    return tensor
