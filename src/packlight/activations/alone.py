"""Each technique alone, in one line, without a planner: everything that a model saves is moved, or encoded.

>>> import torch, packlight
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 64))
>>> with packlight.offload(model, tier="disk"):
...     model(torch.randn(256, 64)).sum().backward()
>>> with packlight.compress(model, codec="int8"):
...     model(torch.randn(256, 64)).sum().backward()
"""

import os
from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from torch import nn

from packlight.activations.compress import CODECS
from packlight.activations.devices import TierByDevice
from packlight.activations.engine import MIN_BYTES, Engine
from packlight.activations.offload import make_tier
from packlight.activations.shelf import Late, OnFull


class Room(TypedDict, total=False):
    """How much may be offloaded, for each device that the model is on."""

    max_bytes: int | None
    """Most that may be stored; None, as without it: no bound."""
    max_in_flight_bytes: int
    """Most that may be on the way out at one moment, and on the way back (256 MiB). Forward waits for a slower way."""
    on_full: OnFull
    """"raise" raises OffloadError where a tensor finds no room; "keep" warns once, and leaves such tensors in place."""
    late: Late
    """"wait": forward waits for copies that are slower than it; "keep": tensors stay, up to that bound again."""


def offload(
    model: nn.Module,
    tier: str = "host",
    *,
    sites: str | Sequence[str] = "*",
    folder: str | os.PathLike[str] | None = None,
    min_bytes: int = MIN_BYTES,
    **room: Unpack[Room],
) -> Engine:
    """Move what a model saves for backward to another place, and fetch it back ahead of its use.

    Losses and gradients stay bit-equal.

    Args:
        model: the model; changed in place until `remove()`.
        tier: "host" for pinned host memory (the model is on a GPU), "disk" for a file without a name.
        sites: patterns of what is moved, see `Engine`.
        folder: of the file; None: the system's for temporary files.
        min_bytes: smaller storages stay.
        room: `max_bytes`, `max_in_flight_bytes`, `on_full` and `late`, see `Room`.

    Returns:
        A handle whose `remove()` undoes it; it works as a context manager too.

    Raises:
        ValueError: an unknown tier, or "host" for a model on the CPU.
        OffloadError: no file can be made in the folder.

    >>> model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    >>> with offload(model, tier="disk", max_bytes=2**30, on_full="keep") as handle:
    ...     model(torch.randn(256, 64)).sum().backward()
    """
    made = TierByDevice(tier, lambda device: make_tier(tier, device=device, folder=folder, **room), _devices_of(model))
    try:
        return Engine(model, dict.fromkeys(_patterns(sites), "offload"), tier=made, min_bytes=min_bytes)
    except BaseException:
        made.close()
        raise


def compress(
    model: nn.Module, codec: str = "fp8", *, sites: str | Sequence[str] = "*", min_bytes: int = MIN_BYTES
) -> Engine:
    """Hold what a model saves for backward in fewer bits.

    Forward stays bit-equal; gradients are those of slightly rounded activations, but with codec "mask".

    Args:
        model: the model; changed in place until `remove()`.
        codec: "fp8" (E4M3, a scale for each 16 elements: 1.125 bytes an element), "fp8_tensor" (E4M3, one scale),
            "int8" (a scale for each 128), "int4" (a scale for each 32: 0.5625 bytes), "mask" (only what fits exactly in
            one bit: bool tensors, what a ReLU asks for, a dropout's noise). The others use "mask", too.
        sites: patterns of what is encoded, see `Engine`.
        min_bytes: smaller storages stay.

    Returns:
        A handle whose `remove()` undoes it; it works as a context manager too.

    Raises:
        ValueError: an unknown codec.

    Source: Xi et al., "COAT", ICLR 2025, arXiv 2410.19313, section 5.

    >>> model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    >>> handle = compress(model, codec="fp8")
    >>> model(torch.randn(256, 64)).sum().backward()
    >>> handle.remove()
    """
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} came, one of {', '.join(CODECS)} was wanted")
    return Engine(model, dict.fromkeys(_patterns(sites), "compress"), codec=codec, min_bytes=min_bytes)


def _patterns(sites: str | Sequence[str]) -> list[str]:
    return [sites] if isinstance(sites, str) else list(sites)


def _devices_of(model: nn.Module) -> list[torch.device]:
    """Return the device that a model's first parameter is on; none where it is still to be put on one."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return [] if device.type == "meta" else [device]
