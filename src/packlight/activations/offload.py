"""Offload: tensors wait for backward outside the device, on the host or on a disk.

This is the door to the tiers: `tier.py` says what a tier is, `host.py` and `disk.py` are the two there are, and
`shelf.py` is what these have in common. `devices.py` has one for each device.
"""

import os

import torch

from packlight.activations.disk import DiskTier
from packlight.activations.host import HostTier
from packlight.activations.shelf import Late, OnFull
from packlight.activations.tier import OffloadError, Stored, Tier, Traffic

__all__ = ["DiskTier", "HostTier", "OffloadError", "Stored", "Tier", "Traffic", "make_tier"]


def make_tier(
    name: str,
    *,
    device: torch.device,
    folder: str | os.PathLike[str] | None = None,
    max_bytes: int | None = None,
    max_in_flight_bytes: int = 256 * 2**20,
    on_full: OnFull = "raise",
    late: Late = "wait",
) -> Tier:
    """Make a tier for the tensors of one device.

    Args:
        name: "host" for pinned host memory, which a CUDA device's tensors go to; "disk" for a file.
        device: where the tensors live.
        folder: where the disk tier makes its file; None for the folder for temporary files.
        max_bytes: bound on what is stored, alignment included; None for no bound of ours.
        max_in_flight_bytes: bound on the bytes that are being moved out, and again on those that were brought back
            ahead of time.
        on_full: "raise" raises OffloadError where a tensor finds no room; "keep" warns once, and leaves such tensors
            where they are.
        late: where copies are slower than compute, "wait" lets forward wait for them; "keep" leaves tensors where they
            are, `max_in_flight_bytes` of them at most, before it waits. "steady", for the disk: see `DiskTier`.

    Returns:
        The tier; close it after the last backward.

    Raises:
        ValueError: a name that is no tier, or a tier that is of no use for the device.
        OffloadError: no file can be made in the folder.

    >>> tier = make_tier("disk", device=torch.device("cpu"))
    >>> stored = tier.put(torch.arange(4))
    >>> stored.get()
    tensor([0, 1, 2, 3])
    >>> tier.close()
    """
    if name == "disk":
        return DiskTier(
            device=device,
            folder=folder,
            max_bytes=max_bytes,
            max_in_flight_bytes=max_in_flight_bytes,
            on_full=on_full,
            late=late,
        )
    if name != "host":
        raise ValueError(f'there is no tier {name!r}; tiers are "host" and "disk"')
    if device.type != "cuda":
        raise ValueError(f'tensors on {device} are in host memory already; use tier="disk" to take them out of it')
    if folder is not None:
        raise ValueError(f'the host tier makes no file in {os.fspath(folder)}; leave folder out, or use tier="disk"')
    return HostTier(
        device=device, max_bytes=max_bytes, max_in_flight_bytes=max_in_flight_bytes, on_full=on_full, late=late
    )
