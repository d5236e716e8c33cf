"""What the operating system lets this process have: memory, processors, locked pages, shared memory.

psutil and /proc/meminfo tell the machine's memory, which a container may not use up: its control group kills the
process long before. A group's limits stand in files whose place depends on the version (1 or 2) and on how much of the
tree the container sees; each group on the way to the root may be the tightest. All files are read below a root, so
that what other machines say can be looked at, too.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from packlight.budget import format_bytes
from packlight.doctor.findings import Finding

ROOT = Path("/")
UNLIMITED_BYTES = 2**60
"""Version 1 writes "no limit" as the largest number of whole pages, near 2**63."""
SMALL_SHARED_BYTES = 64 * 2**20
"""What Docker gives /dev/shm (docker run --shm-size; docs.docker.com/reference/cli/docker/container/run)."""
TRIAL_BYTES = 4096


@dataclass(frozen=True)
class Group:
    """The tightest limits of this process's control groups; None where there is none.

    Attributes:
        memory_bytes: the process is killed above it (memory.max, memory.limit_in_bytes).
        high_bytes: the process is slowed down above it (memory.high; version 2 alone).
        used_bytes: what the group with the tightest limit has in use.
        num_cpus: processors that the group may use at a time (a share of them: cpu.max, cpu.cfs_quota_us).
        versions: of control groups that have told something.
    """

    memory_bytes: int | None = None
    high_bytes: int | None = None
    used_bytes: int | None = None
    num_cpus: float | None = None
    versions: tuple[int, ...] = ()


def read_group(root: Path = ROOT) -> Group:
    """Read the limits of this process's control groups, of both versions.

    Args:
        root: the folder in which proc and sys stand.

    Returns:
        The tightest of the process's own groups and of those around them.
    """
    memory, high, cpus, versions = [], [], [], set()
    for version, controller, folder in _folders(root):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if controller in ("", "memory") and (limit := _bytes(folder / names[0])) is not None:
            memory.append((limit, _bytes(folder / names[1])))
            versions.add(version)
        if controller == "" and (limit := _bytes(folder / "memory.high")) is not None:
            high.append(limit)
            versions.add(version)
        if controller in ("", "cpu") and (share := _cpus(folder, version)) is not None:
            cpus.append(share)
            versions.add(version)
    limit, used = min(memory, default=(None, None), key=lambda pair: pair[0])
    return Group(limit, min(high, default=None), used, min(cpus, default=None), tuple(sorted(versions)))


def _folders(root: Path) -> Iterator[tuple[int, str, Path]]:
    """Yield version, controller ("" for all of version 2) and folder of each group, from the process's own outwards."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if number == "0":
                tops = [(2, "", mount), (2, "", mount / "unified")]
            elif controller in ("memory", "cpu"):
                tops = [(1, controller, mount / name) for name in dict.fromkeys((controller, controllers))]
            else:
                continue
            for version, name, top in tops:
                yield from ((version, name, top / group) for group in _outwards(path))


def _outwards(path: str) -> Iterator[str]:
    """Yield a group's path and those of the groups around it, to the root; a container may not see the inner ones."""
    parts = [part for part in path.split("/") if part and part != ".."]
    yield from ("/".join(parts[:depth]) for depth in range(len(parts), -1, -1))


def _bytes(path: Path) -> int | None:
    with suppress(OSError, ValueError):  # the group has no such file, or it says "max"
        number = int(path.read_text("ascii"))
        return number if number < UNLIMITED_BYTES else None
    return None


def _cpus(folder: Path, version: int) -> float | None:
    with suppress(OSError, ValueError):  # no such file, or "max"
        if version == 2:
            quota, period = (int(word) for word in (folder / "cpu.max").read_text("ascii").split())
        else:
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text("ascii")) for name in ("quota", "period"))
        return quota / period if quota > 0 else None  # -1: no quota
    return None


def memory(root: Path = ROOT) -> Finding:
    """Tell the host's memory, and what a control group leaves of it.

    Args:
        root: see `read_group`.

    Returns:
        The finding: limited where a control group has less than the machine.
    """
    lines = (line.split() for line in (root / "proc/meminfo").read_text("ascii").splitlines())
    sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    total_bytes, free_bytes, group = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"]), read_group(root)
    facts = {
        "total_bytes": total_bytes,
        "available_bytes": free_bytes,
        "swap_bytes": sizes.get("SwapTotal", 0),
        "group_bytes": group.memory_bytes,
        "group_high_bytes": group.high_bytes,
        "group_used_bytes": group.used_bytes,
    }
    found = f"{format_bytes(total_bytes)}, {format_bytes(free_bytes)} available"
    costs = []
    if group.memory_bytes is not None and group.memory_bytes < total_bytes:
        used = "" if group.used_bytes is None else f", of which {format_bytes(group.used_bytes)} are in use"
        found += f"; control group: {format_bytes(group.memory_bytes)}{used}"
        costs.append(
            f"the process is killed above {format_bytes(group.memory_bytes)}; a budget in percent of the CPU counts "
            "the whole machine, so name bytes"
        )
    if group.high_bytes is not None and group.high_bytes < total_bytes:
        found += f"; memory.high: {format_bytes(group.high_bytes)}"
        costs.append(f"the process is slowed down above {format_bytes(group.high_bytes)}")
    return Finding("host memory", "limited" if costs else "works", found, "; ".join(costs), facts=facts)


def processors(root: Path = ROOT, *, num_threads: int | None = None) -> Finding:
    """Tell how many processors this process may use.

    Args:
        root: see `read_group`.
        num_threads: that torch computes with; None where that is not known.

    Returns:
        The finding: limited where threads wait for each other.
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_group(root).num_cpus
    found = f"{num_cpus} for this process"
    facts = {"num_cpus": num_cpus, "num_group_cpus": quota, "num_threads": num_threads}
    if quota is not None:
        found += f"; control group: {quota:g} at a time"
    if num_threads is not None:
        found += f"; torch computes with {num_threads} thread{'s' * (num_threads != 1)}"
    allowed = num_cpus if quota is None else min(quota, num_cpus)
    if num_threads is not None and num_threads > max(1, allowed):
        cost = f"more threads than processors wait for each other; set OMP_NUM_THREADS={max(1, int(allowed))}"
        return Finding("processors", "limited", found, cost, facts=facts)
    return Finding("processors", "works", found, facts=facts)


def shared_memory(folder: Path = ROOT / "dev/shm") -> Finding:
    """Try a file in the folder through which a DataLoader's workers hand over batches.

    Args:
        folder: where the system has its shared memory.

    Returns:
        The finding: limited where it is as small as containers have it.
    """
    cost = "a DataLoader with workers fails; num_workers=0 works"
    try:
        space = os.statvfs(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(TRIAL_BYTES))
            file.flush()
    except OSError as error:
        return Finding(str(folder), "missing", f"{error.strerror or error}", cost)
    total_bytes, free_bytes = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    found = f"{format_bytes(total_bytes)}, {format_bytes(free_bytes)} free"
    facts = {"total_bytes": total_bytes, "free_bytes": free_bytes}
    if total_bytes <= SMALL_SHARED_BYTES:
        cost = "a DataLoader's workers fail (bus error) where batches are larger; in Docker: --shm-size or --ipc=host"
        return Finding(str(folder), "limited", found, cost, facts=facts)
    return Finding(str(folder), "works", found, facts=facts)
