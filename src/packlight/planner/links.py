"""The ways to the tiers: how fast bytes move, what that takes from compute, and how many there is room for.

A disk's data sheet says little of what a training process gets, beside compute, checksums and a file system. So the way
to the disk is measured with the tier itself, by moving a few tensors out and back (a fraction of a second, once in a
process and folder). A copy to pinned host memory goes through the device's own engine and takes nothing from compute.
"""

import functools
import os
import time
from contextlib import closing

import torch
from torch.utils._python_dispatch import _disable_current_modes

from packlight.activations.disk import NUM_THREADS
from packlight.activations.offload import Tier, make_tier
from packlight.activations.tier import OffloadError
from packlight.budget import parse_bytes
from packlight.planner.hardware import Chill
from packlight.planner.known_hardware import Hardware
from packlight.step import Link

SAMPLE_BYTES = 16 * 2**20
NUM_SAMPLES = 6
"""Enough that the queue is busy for tenths of a second on an ordinary disk."""
SMALL_BYTES, NUM_SMALL, NUM_ROUNDS = 2**14, 32, 3
"""Copies in which bytes do not count, and how often so many of them are measured."""


def find_link(
    device: torch.device,
    *,
    host_budget: int | str | None = None,
    disk: str | os.PathLike[str] | None = None,
    known: Hardware | None = None,
) -> Link | None:
    """Return the way to the tier that a plan may use.

    A plan uses one tier: pinned host memory where the model is on a GPU and `host_budget` allows some, else the disk.

    Args:
        device: where the model is.
        host_budget: bytes allowed in host memory.
        disk: folder of the disk tier; the disk of another machine is not known.
        known: the device to plan for instead of the model's; nothing is measured.

    Returns:
        The way; None where no tier was allowed.

    Raises:
        ValueError: the budget cannot be read, or no file can be made in the folder.
    """
    if known is not None and host_budget is not None:
        speed = known.host_bytes_per_second
        return Link("host", speed, speed, 0.0, parse_bytes(host_budget))
    if known is not None or device.type == "meta":
        return None
    if device.type == "cuda" and host_budget is not None:
        return _host_link(device.type, parse_bytes(host_budget, total_bytes=host_memory_bytes()))
    if disk is None:
        return None
    folder = os.fspath(disk)
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder!r} for the disk tier; make it, or name another")
    try:
        return _disk_link(device.type, os.path.abspath(folder))
    except OffloadError as error:
        raise ValueError(str(error)) from error


def unused(
    device: torch.device,
    *,
    host_budget: int | str | None = None,
    disk: str | os.PathLike[str] | None = None,
    known: Hardware | None = None,
) -> tuple[str, ...]:
    """Say in sentences which of what was allowed `find_link` leaves out."""
    said = []
    if host_budget is not None and known is None and device.type != "cuda":
        said.append(f"host_budget is for what a GPU moves; the model is on {device.type}")
    if disk is not None and known is not None:
        said.append(f"the disk in {os.fspath(disk)} is this machine's, and the plan is for {known.name}")
    elif disk is not None and device.type == "cuda" and host_budget is not None:
        said.append(f"the disk in {os.fspath(disk)} is not used: a plan uses one tier, and the host is faster")
    return tuple(said)


def host_memory_bytes() -> int:
    """Return the size of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _disk_link(device_type: str, folder: str) -> Link:
    device = torch.device(device_type)
    with closing(make_tier("disk", device=device, folder=folder)) as tier:
        out, back, busy, staging_bytes = _measured(tier, device)
        small = _processor_seconds(tier, device)
    stat = os.statvfs(folder)
    capacity_bytes, share = stat.f_bavail * stat.f_frsize, _share_taken()
    return Link(
        "disk",
        out_bytes_per_second=out,
        in_bytes_per_second=back,
        busy_seconds_per_byte=busy * share,
        capacity_bytes=capacity_bytes,
        staging_bytes=staging_bytes,
        folder=folder,
        busy_seconds_per_copy=small * share,
    )


def _share_taken() -> float:
    """Return what of the copying threads' time compute loses: all of it, but for cores that it leaves idle.

    A parallel loop ends with its slowest thread, so a core that is taken from one of them is lost to all. Ranks that
    torchrun starts on one machine share its cores.
    """
    num_busy = torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_idle = max(0, len(os.sched_getaffinity(0)) - num_busy)
    return max(0.0, 1 - num_idle / NUM_THREADS)


@functools.cache
def _host_link(device_type: str, capacity_bytes: int) -> Link:
    device = torch.device(device_type)
    with closing(make_tier("host", device=device)) as tier:
        out, back, _, _ = _measured(tier, device)
    return Link("host", out, back, 0.0, capacity_bytes)


def _processor_seconds(tier: Tier, device: torch.device) -> float:
    """Return the processor's seconds for one small copy, in all threads, where a step's operators run in between."""
    best = dict.fromkeys((False, True), float("inf"))
    with _disable_current_modes(), torch.inference_mode():
        sample, chill = torch.ones(SMALL_BYTES, dtype=torch.uint8, device=device), Chill(device)
        for _ in range(NUM_ROUNDS):
            for moves in best:
                start, stored = time.process_time(), []
                for _ in range(NUM_SMALL):
                    chill()
                    stored += [tier.put(sample)] if moves else []
                tier.flush()
                for at in range(NUM_SMALL):
                    chill()
                    if moves:
                        stored[at].get()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best[moves] = min(best[moves], time.process_time() - start)
    return max(0.0, best[True] - best[False]) / (2 * NUM_SMALL)


def _measured(tier: Tier, device: torch.device) -> tuple[float, float, float, int]:
    """Return bytes per second out and back, the processor's seconds for a byte one way, and the bytes of staging."""
    num_bytes = NUM_SAMPLES * SAMPLE_BYTES
    with _disable_current_modes(), torch.inference_mode():
        sample = torch.ones(SAMPLE_BYTES, dtype=torch.uint8, device=device)
        first = [tier.put(sample) for _ in range(NUM_SAMPLES)]  # they make threads, buffers and pinned memory
        first[-1].get()
        tier.flush()
        del first
        busy, start = time.process_time(), time.perf_counter()
        stored = [tier.put(sample) for _ in range(NUM_SAMPLES)]
        tier.flush()
        turn = time.perf_counter()
        for each in stored:
            each.get()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        back, busy = time.perf_counter() - turn, time.process_time() - busy
    staging_bytes = tier.traffic().pinned_bytes
    return num_bytes / (turn - start), num_bytes / back, busy / (2 * num_bytes), staging_bytes
