"""Room in host memory for offloaded tensors: few large slabs, cut into slots.

To pin a tensor's memory takes about 3 ms (pytorch#186162), more than to copy most activations. So memory is pinned in
slabs of at least 64 MiB that stay until the end, and tensors get slots in them; the second step of a training run
finds every slot that the first one made.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from packlight.activations.extents import UNBOUNDED_BYTES, Extent, Extents, round_up
from packlight.activations.pages import PAGE_BYTES, Pages

SLAB_BYTES = 64 * 2**20
SLOT_BYTES = 512
"""Alignment of a slot: as CUDA's allocator aligns, which is what copies are fastest with."""


class Slab:
    """One piece of host memory, and which of its bytes are in use."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Take the memory, pinned where the device is a GPU."""
        self.pages = Pages(num_bytes, device)
        self.extents = Extents(num_bytes, alignment=SLOT_BYTES)


class Slot(NamedTuple):
    """A range of a slab."""

    slab: Slab
    extent: Extent

    def memory(self, num_bytes: int) -> Tensor:
        """Return the first bytes: uint8, [num_bytes]."""
        return self.slab.pages.tensor[self.extent.start : self.extent.start + num_bytes]


class Slabs:
    """Hands out slots of host memory; it does no locking."""

    def __init__(self, device: torch.device, *, max_bytes: int | None) -> None:
        """Start without memory.

        Args:
            device: whose copies will use the memory.
            max_bytes: bound on all slabs together; None for no bound.
        """
        self._device = device
        self._max_bytes = UNBOUNDED_BYTES if max_bytes is None else max_bytes // PAGE_BYTES * PAGE_BYTES
        self._slabs: list[Slab] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.pages.num_bytes for slab in self._slabs)

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(slab.extents.used_bytes for slab in self._slabs)

    def allocate(self, num_bytes: int) -> Slot | None:
        """Return a slot of at least `num_bytes` > 0 bytes, or None where the bound leaves no room.

        Raises:
            OffloadError: the host has no memory for another slab.
        """
        for slab in self._slabs:
            extent = slab.extents.allocate(num_bytes)
            if extent is not None:
                return Slot(slab, extent)
        left_bytes = self._max_bytes - self.num_bytes
        slab_bytes = min(max(round_up(num_bytes, PAGE_BYTES), SLAB_BYTES), left_bytes)
        if slab_bytes < num_bytes:
            return None
        self._slabs.append(Slab(slab_bytes, self._device))
        return self.allocate(num_bytes)

    def release(self, slot: Slot) -> None:
        """Take a slot back."""
        slot.slab.extents.release(slot.extent)

    def close(self) -> None:
        """Give the memory up; the copies must have ended."""
        while self._slabs:
            self._slabs.pop().pages.close()
