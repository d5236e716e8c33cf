"""Control groups of both versions, read from files as other machines have them."""

from pathlib import Path

import pytest

from packlight.control_groups import Group, read_group
from packlight.doctor.limits import memory, processors, shared_memory

MIB = 2**20
MEMINFO = "MemTotal: 8192000 kB\nMemFree: 100 kB\nMemAvailable: 4096000 kB\nSwapTotal: 1024 kB\n"
UNLIMITED_V1 = "9223372036854771712"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


CASES: list[tuple[dict[str, str], Group]] = [
    ({}, Group()),
    (  # version 2, seen from inside a container: its own group is the root
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": str(512 * MIB),
            "sys/fs/cgroup/memory.high": str(400 * MIB),
            "sys/fs/cgroup/memory.current": str(100 * MIB),
            "sys/fs/cgroup/cpu.max": "150000 100000",
        },
        Group(512 * MIB, 400 * MIB, 100 * MIB, 1.5, (2,)),
    ),
    (  # version 2, a slice around the group is tighter than the group
        {
            "proc/self/cgroup": "0::/user.slice/job.scope",
            "sys/fs/cgroup/user.slice/job.scope/memory.max": "max",
            "sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000",
            "sys/fs/cgroup/user.slice/memory.max": str(256 * MIB),
            "sys/fs/cgroup/user.slice/memory.current": str(MIB),
        },
        Group(256 * MIB, None, MIB, None, (2,)),
    ),
    (  # version 1: one folder for each controller, or for several; quota -1 is none
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": str(128 * MIB),
            "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": str(64 * MIB),
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        Group(128 * MIB, None, 64 * MIB, 0.5, (1,)),
    ),
    (  # version 1 in a container that does not see its own path, only the mounted root of it
        {
            "proc/self/cgroup": "4:memory:/docker/abc",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(64 * MIB),
        },
        Group(64 * MIB, None, None, None, (1,)),
    ),
]


@pytest.mark.parametrize(("files", "expected"), CASES)
def test_the_tightest_group_counts(tmp_path: Path, files: dict[str, str], expected: Group) -> None:
    assert read_group(write(tmp_path, files)) == expected


def test_a_group_below_the_machines_memory_is_a_limit_and_one_above_is_none(tmp_path: Path) -> None:
    limited = memory(write(tmp_path / "a", CASES[1][0]))
    assert limited.status == "limited"
    assert "killed above 512.00 MiB" in limited.cost and "slowed down above 400.00 MiB" in limited.cost
    assert limited.facts["group_bytes"] == 512 * MIB and limited.facts["available_bytes"] == 4096000 * 1024
    ample = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": str(2**40)}
    assert memory(write(tmp_path / "b", ample)).status == "works"


def test_more_threads_than_the_quota_allows_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, CASES[3][0])
    found = processors(root, num_threads=8)
    assert found.status == "limited" and "OMP_NUM_THREADS=1" in found.cost
    assert processors(root, num_threads=1).status == "works"


def test_no_shared_memory_is_told(tmp_path: Path) -> None:
    assert shared_memory(tmp_path / "shm").status == "missing"
    assert shared_memory(tmp_path).facts["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
