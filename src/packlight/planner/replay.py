"""A recomputed block's second run: what it makes, what it saves again, and how high it stands meanwhile.

Early stop ends the run at the block's last save, so what its forward made after that is not made again. The run comes
on top of whatever lives at the moment at which backward wants the first of the block's saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from packlight.step import Profile, Region, Save


@dataclass(frozen=True)
class Replay:
    """A region's second run: its peak above what lives then, and what it saves again (storage -> release)."""

    region: Region
    peak_bytes: int
    saved: dict[int, int]

    @property
    def before(self) -> int:
        """Return the last event before it, whose live bytes it comes on top of."""
        return max(0, self.region.unpacked - 1)


def replay_of(profile: Profile, region: Region, saves: Sequence[Save]) -> Replay:
    """Run through a region's events up to its last save.

    Args:
        profile: the step.
        region: one of its regions.
        saves: those made in the region.

    Returns:
        The second run; it saves nothing where recomputing the region spares nothing.
    """
    storages = profile.storages
    inside = [at for at, storage in enumerate(storages) if region.start <= storage.born < region.last_packed]
    saved: dict[int, int] = {}
    for save in saves:
        is_wanted = save.used > region.unpacked  # else nothing that backward needs came of it
        if is_wanted and region.start <= storages[save.storage].born:
            saved[save.storage] = max(save.used, saved.get(save.storage, 0))
    events = [(storages[at].born, storages[at].num_bytes) for at in inside]
    events += [(storages[at].died, -storages[at].num_bytes) for at in inside if at not in saved]
    live = peak = 0
    for when, num_bytes in sorted(events):
        if when < region.last_packed:
            live += num_bytes
            peak = max(peak, live)
    return Replay(region, peak + region.copied_bytes, saved)
