"""Room in host memory for offloaded tensors: few large slabs, cut into slots.

To pin a tensor's memory takes about 3 ms (pytorch#186162), more than to copy most activations. So memory is pinned in
slabs that stay, and tensors get slots in them; the second step of a training run finds every slot that the first one
made. Slabs of one size would waste what the last tensor did not fill: 40 MiB tensors, a third of 64 MiB slabs. So a
large tensor that finds no room gets a slab of its very size, and only small ones share. What is wasted all the same is
known when everything is free again: then one slab of the most that was ever used takes the place of all.

    first step    [a a a a b b . . . .] [c c c c c c] [d d d d d d d d]     the rest of the shared slab is wasted
    afterwards    [a a a a b b c c c c c c d d d d d d d d]                 pinned anew, once
"""

from typing import NamedTuple

import torch
from torch import Tensor

from packlight.activations.extents import UNBOUNDED_BYTES, Extent, Extents, round_up
from packlight.activations.pages import PAGE_BYTES, Pages

SLAB_BYTES = 64 * 2**20
"""Of a slab that small tensors share."""
LARGE_BYTES = SLAB_BYTES // 16
"""What gets a slab of its own; smaller ones waste no more than this at the end of a shared one."""
WASTED_SHARE = 1 / 16
"""To pin anew costs as much as the first step did, so less waste than this is left."""
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
        self._most_used_bytes = self._fitted_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.pages.num_bytes for slab in self._slabs)

    @property
    def taken_bytes(self) -> int:
        """Bytes that the host has less because of them."""
        return sum(slab.pages.taken_bytes for slab in self._slabs)

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
                self._most_used_bytes = max(self._most_used_bytes, self.used_bytes)
                return Slot(slab, extent)
        left_bytes = self._max_bytes - self.num_bytes
        slab_bytes = min(round_up(num_bytes, PAGE_BYTES) if num_bytes >= LARGE_BYTES else SLAB_BYTES, left_bytes)
        if slab_bytes < num_bytes:
            return None
        self._slabs.append(Slab(slab_bytes, self._device))
        return self.allocate(num_bytes)

    def release(self, slot: Slot) -> None:
        """Take a slot back."""
        slot.slab.extents.release(slot.extent)

    @property
    def is_wasteful(self) -> bool:
        """Whether `fit` would give memory back: nothing is stored, and more was never needed than a part of it."""
        if self.used_bytes or self._most_used_bytes <= self._fitted_bytes:  # it was fitted to that once
            return False
        wasted_bytes = self.num_bytes - round_up(self._most_used_bytes, PAGE_BYTES)
        is_worth_it = wasted_bytes > self._most_used_bytes * WASTED_SHARE
        return is_worth_it and all(slab.pages.gives_back for slab in self._slabs)

    def fit(self) -> None:
        """Put one slab of the most that was ever used in the place of all; the copies must have ended.

        Raises:
            OffloadError: the host has no such piece of memory; then there is no slab, as in the beginning.
        """
        self.close()
        self._fitted_bytes = self._most_used_bytes
        self._slabs.append(Slab(round_up(self._most_used_bytes, PAGE_BYTES), self._device))

    def finds_room_in_unused(self, num_bytes: int) -> bool:
        """Whether the bound would leave room for a request without the slabs in which nothing is stored."""
        used = [slab.pages.num_bytes for slab in self._slabs if slab.extents.used_bytes]
        return len(used) < len(self._slabs) and sum(used) + round_up(num_bytes, PAGE_BYTES) <= self._max_bytes

    def drop_unused(self) -> None:
        """Give up the slabs in which nothing is stored; the copies must have ended."""
        for slab in [slab for slab in self._slabs if not slab.extents.used_bytes]:
            self._slabs.remove(slab)
            slab.pages.close()

    def close(self) -> None:
        """Give the memory up; the copies must have ended."""
        while self._slabs:
            self._slabs.pop().pages.close()
