"""What is tried, on real folders, with the real compiler, and on a GPU where there is one."""

import os
import resource
from pathlib import Path

import pytest
import torch

from packlight.doctor import trials
from packlight.doctor.findings import guarded
from packlight.numerics.compiler import find_compiler


def test_bytes_go_to_the_folder_and_back_and_nothing_is_left(tmp_path: Path) -> None:
    found = trials.disk(str(tmp_path))
    assert found.status in ("works", "limited")  # as the folder's file system is
    assert found.facts["free_bytes"] > 0 and found.facts["folder"] == str(tmp_path)
    assert found.status == "limited" or found.facts["direct"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no folder is known to lie in memory")
def test_a_folder_in_memory_is_limited() -> None:
    found = trials.disk("/dev/shm")
    assert found.status == "limited" and found.facts["in_memory"] and "as much memory as before" in found.cost


def test_a_folder_that_is_not_there_is_missing_and_essential(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    (found,) = guarded("disk tier", lambda: trials.disk(gone), cost=trials.NO_DISK, essential=True)
    assert found.status == "missing" and found.essential and gone in found.found and found.cost == trials.NO_DISK


def test_vectors_are_those_that_the_compiler_uses() -> None:
    command, _ = find_compiler()
    names = [name for _, name in trials.VECTORS]
    assert trials.vector_set(command) in names  # every processor that torch has a build for has one of them
    assert trials.vector_set(("false",)) == ""


def test_the_kernel_is_built_or_found() -> None:
    found = trials.compiler()
    assert found.status == "works", found
    assert found.facts["vectors"] in found.found and found.facts["command"][0] in found.found


def test_the_limit_of_locked_memory_is_the_processs_own() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, hard))
    try:
        assert trials.locked_limit_bytes() == 4096
        assert "4.00 KiB" in trials.pinned_memory().found
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_the_driver_is_read_as_its_module_tells_it(tmp_path: Path) -> None:
    assert trials.driver_version(tmp_path) == ""
    path = tmp_path / "proc/driver/nvidia/version"
    path.parent.mkdir(parents=True)
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024"
    path.write_text(line + os.linesep)
    assert trials.driver_version(tmp_path) == "550.54.15"


def test_each_gpu_is_tried_or_its_absence_told(tmp_path: Path) -> None:
    found = list(trials.gpus(tmp_path))
    assert len(found) == max(1, torch.cuda.device_count())
    if not torch.cuda.is_available():
        assert found[0].status == "missing" and found[0].cost == trials.NO_GPU
    else:
        assert all(each.status == "works" for each in found), found
