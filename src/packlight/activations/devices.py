"""One tier for each device that a model's tensors are on, made when the first of them comes.

A tier stores tensors of one device. A model may be made on the meta device and filled elsewhere, be spread over several
devices, or compute a mask on the CPU beside its GPU; none of that is known when offloading is asked for. A tensor on a
device that no tier serves stays where it is, which is said once.
"""

import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import Tensor

from packlight.activations.tier import Stored, Tier, Traffic


class TierByDevice:
    """A tier that hands each tensor to its device's own.

    Args:
        name: of the tiers.
        make: makes the tier of a device; a ValueError says that there is none for it.
        devices: those whose tiers are made at once.
    """

    def __init__(self, name: str, make: Callable[[torch.device], Tier], devices: Iterable[torch.device] = ()) -> None:
        self.name = name
        self._make, self._lock = make, threading.Lock()
        self._tiers: dict[torch.device, Tier | None] = {each: make(each) for each in devices}

    def takes(self, device: torch.device, *, tells: bool = True) -> bool:
        """Tell whether tensors of a device can be put; where not, warn of it once if it `tells`."""
        return self._tier_for(device, tells=tells) is not None

    def put(self, flat: Tensor) -> Stored:
        """Begin to move a tensor out; see `Tier.put`."""
        tier = self._tier_for(flat.device)
        assert tier is not None, "`takes` was asked before"
        return tier.put(flat)

    def flush(self) -> None:
        """Wait until everything that was put has been moved."""
        for tier in self._made():
            tier.flush()

    def drain(self) -> None:
        """Give back the memory of everything that was put; see `Tier.drain`."""
        for tier in self._made():
            tier.drain()

    def close(self) -> None:
        """Close every tier."""
        for tier in self._made():
            tier.close()

    def traffic(self) -> Traffic:
        """Return what all tiers moved so far, added up."""
        each = [asdict(tier.traffic()) for tier in self._made()] or [asdict(Traffic(0, 0, 0.0, 0.0, 0, 0))]
        return Traffic(**{name: sum(one[name] for one in each) for name in each[0]})

    def _made(self) -> list[Tier]:
        return [tier for tier in self._tiers.values() if tier is not None]

    def _tier_for(self, device: torch.device, *, tells: bool = True) -> Tier | None:
        if device not in self._tiers:  # asked for every save, so without the lock at first
            with self._lock:
                if device not in self._tiers and not self._make_or_tell(device, tells=tells):
                    return None
        return self._tiers[device]

    def _make_or_tell(self, device: torch.device, *, tells: bool) -> bool:
        """Make a device's tier, or say that there is none; whether that is settled now."""
        try:
            self._tiers[device] = self._make(device)
        except ValueError as error:
            if not tells:
                return False
            self._tiers[device] = None
            warnings.warn(f"what is saved on {device} is not offloaded but kept: {error}", stacklevel=2)
        return True


def by_device(tier: Tier) -> TierByDevice:
    """Return a tier that knows which devices it serves: the given one's own, or all where it names none."""
    if isinstance(tier, TierByDevice):
        return tier
    own: torch.device | None = getattr(tier, "device", None)

    def make(device: torch.device) -> Tier:
        if own not in (None, device):
            raise ValueError(f"the tier is for {own}; make one for each device, or use packlight.offload")
        return tier

    return TierByDevice(tier.name, make)
