"""What the machine has of memory, and what control groups leave of it, and of its processors, to this process.

psutil and /proc/meminfo tell the machine's memory, which a container may not use up: its control group kills the
process long before. A group's limits stand in files whose place depends on the version (1 or 2) and on how much of the
tree the container sees; each group on the way to the root may be the tightest. All files are read below a root, so
that what other machines say can be looked at, too.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
UNLIMITED_BYTES = 2**60
"""Version 1 writes "no limit" as the largest number of whole pages, near 2**63."""


def host_memory(root: Path = ROOT) -> dict[str, int]:
    """Return the machine's memory in bytes, by the names of /proc/meminfo ("MemTotal", "MemAvailable").

    Args:
        root: the folder in which proc stands.
    """
    lines = (line.split() for line in (root / "proc/meminfo").read_text("ascii").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}


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
