"""What a trace notes of saves and of blocks' calls while the step runs, and how it becomes a record.

Some of it is known only when backward is over: when autograd released a save, when its block was wanted first. The
records of `packlight.step` are frozen and count from the first storage of the step, so they are written at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from packlight.planner.known import Noted
from packlight.planner.timeline import Entry
from packlight.step import Place, Region, Save, Storage


@dataclass
class DraftRegion:
    """A block's call while it is traced."""

    block: str
    start: int
    inputs: tuple[int, ...]
    protocol: bool
    end: int = 0
    last_packed: int = 0
    unpacked: int | None = None
    released: int | None = None
    outputs: tuple[int, ...] = ()
    seconds: float = 0.0
    copied_bytes: int = 0
    copied: dict[int | None, int] = field(default_factory=dict)
    copy_saves: list["DraftSave"] = field(default_factory=list)
    num_saves: int = 0

    def note_save(self, event: int) -> None:
        """Note that a tensor is saved in it."""
        self.last_packed = event
        self.num_saves += 1


@dataclass
class DraftSave:
    """A save while it is traced; see `packlight.step.Save`."""

    storage: int
    region: int
    packed: int
    site: str = ""
    encoding: str = ""
    num_elements: int = 0
    released: int | None = None
    unpacked: int | None = None
    used: int | None = None
    packed_seconds: float = 0.0
    unpacked_seconds: float | None = None


class HeldSave:
    """What autograd holds instead of a saved tensor: enough to make another of its kind, or one that stays anyway."""

    __slots__ = ("__weakref__", "device", "dtype", "noted", "save", "shape", "stays", "stride")

    def __init__(self, tensor: torch.Tensor, save: DraftSave, *, stays: bool, noted: Noted | None) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.device, self.save, self.noted = tensor.device, save, noted
        self.stays = tensor if stays else None


class Draft:
    """Writes the records of one trace.

    Args:
        num_resident: so many entries of the line were there before the step.
        num_events: the length of the line; what comes later is at its end.
        keeps_gradients: whether no gradient may be used as soon as it is complete.
    """

    def __init__(self, num_resident: int, num_events: int, *, keeps_gradients: bool) -> None:
        self._num_resident, self._num_events, self._keeps_gradients = num_resident, num_events, keeps_gradients

    def storages(self, entries: Sequence[Entry]) -> tuple[Storage, ...]:
        """Return what the step created, of all entries of the line."""
        made = (entry for entry in entries[self._num_resident :] if entry.born < self._num_events)
        return tuple(
            Storage(
                num_bytes=entry.num_bytes,
                born=entry.born,
                died=self._before_end(entry.died),
                phase=entry.phase,
                is_gradient=entry.category == "gradients",
                completed=self._completed(entry),
            )
            for entry in made
        )

    def places(self, entries: Sequence[Entry]) -> tuple[Place, ...]:
        """Return where storages of the step were made, as far as that is known."""
        found: dict[tuple[str, str], list[int]] = {}
        for index, entry in enumerate(entries[self._num_resident :]):
            if (entry.site or entry.code) and entry.born < self._num_events:
                found.setdefault((entry.site, entry.code), []).append(index)
        return tuple(Place(site, code, tuple(indices)) for (site, code), indices in found.items())

    def _completed(self, entry: Entry) -> int:
        if entry.completed is None or self._keeps_gradients:
            return -1
        return self._before_end(entry.completed)

    def save(self, save: DraftSave) -> Save:
        """Return a save as a record."""
        released = self._before_end(save.released)
        used = released if save.used is None else self._before_end(save.used)
        return Save(
            storage=save.storage - self._num_resident,
            region=save.region,
            packed=save.packed,
            released=released,
            unpacked=used if save.unpacked is None else self._before_end(save.unpacked),
            used=used,
            site=save.site,
            encoding=save.encoding,
            num_elements=save.num_elements,
            packed_seconds=save.packed_seconds,
            unpacked_seconds=save.packed_seconds if save.unpacked_seconds is None else save.unpacked_seconds,
        )

    def _saved_copies(self, region: DraftRegion) -> tuple[tuple[int, int], ...]:
        """Say for each buffer that the region saves how long backward uses the second run's copy of it."""
        used: dict[int, int] = {}
        for save in map(self.save, region.copy_saves):
            used[save.storage] = max(save.used, used.get(save.storage, 0))
        wanted = {storage: event for storage, event in used.items() if event > self._before_end(region.unpacked)}
        return tuple((region.copied[storage + self._num_resident], event) for storage, event in wanted.items())

    def _before_end(self, event: int | None) -> int:
        """Return an event of the step, its end for what comes later or never."""
        return self._num_events if event is None else min(event, self._num_events)

    def region(self, region: DraftRegion) -> Region:
        """Return a block's call as a record."""
        shift = self._num_resident
        return Region(
            block=region.block,
            start=region.start,
            end=region.end,
            last_packed=region.last_packed,
            unpacked=self._before_end(region.unpacked),
            released=self._before_end(region.released),
            inputs=tuple(index - shift for index in region.inputs),
            outputs=tuple(index - shift for index in region.outputs),
            forward_seconds=region.seconds,
            copied_bytes=region.copied_bytes,
            saved_copies=self._saved_copies(region),
            drops_side_outputs=region.protocol,
            num_saves=region.num_saves,
        )
