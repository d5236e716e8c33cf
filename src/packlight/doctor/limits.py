"""What the operating system lets this process have: memory, processors, locked pages, shared memory.

A machine's numbers are not a container's: what its control group leaves (`control_groups.py`), what may be locked and
what a DataLoader's workers can share is less, and training fails on it long before the machine is full.
"""

import os
import tempfile
from pathlib import Path

from packlight.budget import format_bytes
from packlight.control_groups import ROOT, host_memory, read_group
from packlight.doctor.findings import Finding

SMALL_SHARED_BYTES = 64 * 2**20
"""What Docker gives /dev/shm (docker run --shm-size; docs.docker.com/reference/cli/docker/container/run)."""
TRIAL_BYTES = 4096


def memory(root: Path = ROOT) -> Finding:
    """Tell the host's memory, and what a control group leaves of it.

    Args:
        root: see `read_group`.

    Returns:
        The finding: limited where a control group has less than the machine.
    """
    sizes = host_memory(root)
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
