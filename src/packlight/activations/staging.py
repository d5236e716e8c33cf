"""How a chunk of a tensor becomes bytes that a file call takes, and back; one staging serves one thread.

O_DIRECT wants page-aligned memory, which torch's allocator does not give, and a file call cannot see a GPU's memory.
So a chunk goes through a MiB of pages, pinned for a GPU. Where neither holds, the tensor's own memory is used.
A device tensor's bytes pass through a stream of the thread's own, which is waited for before the pages are used
again; so when the last chunk is over, nothing of the tensor is in use any more.

```
outgoing   tensor --load-->  pages --write--> file          the checksum is taken of the pages:
incoming   tensor <-unload-- pages <--read--- file          of just the bytes that are written
```
"""

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from packlight.activations.extents import round_up
from packlight.activations.pages import PAGE_BYTES, Pages

CHUNK_BYTES = 2**20
"""Large enough that a file call's fixed cost is small (four times as much is no faster); two threads hold one each."""


class Staging(Protocol):
    """Room for one chunk. A part is uint8, 1-D, of at most CHUNK_BYTES."""

    num_bytes: int
    """What it takes of the host's memory."""

    def load(self, part: Tensor) -> memoryview:
        """Return a part's bytes; maybe with a tail of other bytes up to a whole page."""

    def room(self, part: Tensor) -> memoryview:
        """Return where a part's bytes are to be read to, with the same tail."""

    def unload(self, part: Tensor) -> None:
        """Move the bytes from the room into the part."""

    def close(self) -> None:
        """Give the memory up."""


class NoStaging:
    """The tensor's own memory."""

    num_bytes = 0

    def load(self, part: Tensor) -> memoryview:
        """Return it."""
        return part.numpy().data

    room = load

    def unload(self, part: Tensor) -> None:
        """Nothing is left to do: the bytes were read into the part."""

    def close(self) -> None:
        """There is nothing to give up."""


class HostStaging:
    """Page-aligned memory for tensors of the CPU."""

    def __init__(self) -> None:
        """Take the memory."""
        self._pages = Pages(CHUNK_BYTES, torch.device("cpu"))
        self.num_bytes = self._pages.taken_bytes

    def load(self, part: Tensor) -> memoryview:
        """Copy the part to the pages."""
        # Not Tensor.copy_: called from our thread, it would start an OpenMP team of its own.
        ctypes.memmove(self._pages.tensor.data_ptr(), part.data_ptr(), part.numel())
        return self.room(part)

    def room(self, part: Tensor) -> memoryview:
        """Return whole pages."""
        return self._pages.view(0, round_up(part.numel(), PAGE_BYTES))

    def unload(self, part: Tensor) -> None:
        """Copy the pages to the part."""
        ctypes.memmove(part.data_ptr(), self._pages.tensor.data_ptr(), part.numel())

    def close(self) -> None:
        """Let the pages go."""
        self._pages.close()


class DeviceStaging:
    """Pinned memory for tensors of a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Take the memory, and a stream."""
        self._pages = Pages(CHUNK_BYTES, device)
        self.num_bytes = self._pages.taken_bytes
        self._stream = torch.cuda.Stream(device)

    def load(self, part: Tensor) -> memoryview:
        """Copy the part to the pages, and wait for it."""
        self._copy(self._pages.tensor[: part.numel()], part)
        return self.room(part)

    def room(self, part: Tensor) -> memoryview:
        """Return whole pages."""
        return self._pages.view(0, round_up(part.numel(), PAGE_BYTES))

    def unload(self, part: Tensor) -> None:
        """Copy the pages to the part, and wait for it."""
        self._copy(part, self._pages.tensor[: part.numel()])

    def close(self) -> None:
        """Let the pages go; no copy is left running by `load` and `unload`."""
        self._pages.close()

    def _copy(self, target: Tensor, source: Tensor) -> None:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()


def make_staging(device: torch.device, *, direct: bool) -> Staging:
    """Return what a thread needs for tensors of a device, and for a file that is opened with O_DIRECT or not."""
    if device.type == "cuda":
        return DeviceStaging(device)
    return HostStaging() if direct else NoStaging()
