"""The disk tier alone: memory stays bounded, a file without a name, checksums, and disks that are full or fail."""

import errno
import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from packlight.activations import spill
from packlight.activations.disk import DiskTier
from packlight.activations.engine import Engine
from packlight.activations.extents import Extents
from packlight.activations.offload import OffloadError, make_tier
from packlight.activations.shelf import Late
from packlight.activations.spill import SpillFile, is_in_memory

LATE: tuple[Late, ...] = ("wait", "keep", "steady")
CPU = torch.device("cpu")
KIB = 1024


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    tier = DiskTier(device=CPU, folder=tmp_path, max_in_flight_bytes=64 * KIB)
    yield tier
    tier.close()


class Gate:
    """Lets writes pass one by one, and counts those that begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._passes, self.begun = threading.Semaphore(0), threading.Semaphore(0)
        self._write = SpillFile.write
        gate = self

        def write(file: SpillFile, offset: int, chunk: memoryview) -> None:
            gate.begun.release()
            assert gate._passes.acquire(timeout=60)
            gate._write(file, offset, chunk)

        monkeypatch.setattr(SpillFile, "write", write)

    def let_pass(self, num_writes: int) -> None:
        for _ in range(num_writes):
            self._passes.release()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def full(size: int, value: int) -> Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def file_descriptor(tier: DiskTier) -> int:
    return tier._file._fd


def test_put_waits_at_the_bound_and_no_earlier(tier: DiskTier, gate: Gate) -> None:
    alive: list[weakref.ref[Tensor]] = []
    events: list[str] = []

    def put(num_tensors: int) -> None:
        for number in range(num_tensors):
            flat = full(16 * KIB, number)
            alive.append(weakref.ref(flat))
            held.append(tier.put(flat))
            del flat
            events.append(f"put {number}")
            num_alive.append(sum(each() is not None for each in alive))

    held: list[object] = []
    num_alive: list[int] = []
    thread = threading.Thread(target=put, args=(7,))
    thread.start()
    for _ in range(2):
        assert gate.begun.acquire(timeout=60)
    for number in range(7):
        while len(events) < min(4 + number, 7):  # four fit the bound, then each write lets one more in
            assert thread.is_alive() or len(events) == 7
        assert len(events) == min(4 + number, 7)
        gate.let_pass(1)
    thread.join()
    tier.flush()
    assert max(num_alive) == 4, "more tensors were alive than the bound allows"
    assert [each() for each in alive] == [None] * 7


def slow_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    write = SpillFile.write

    def slow(file: SpillFile, offset: int, chunk: memoryview) -> None:
        time.sleep(0.01)
        write(file, offset, chunk)

    monkeypatch.setattr(SpillFile, "write", slow)


@pytest.mark.parametrize(("late", "keep_bytes"), [("wait", None), ("keep", None), ("keep", 80 * KIB), ("keep", 5)])
def test_memory_is_bounded_where_a_disk_is_slow(
    late: Late, keep_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_writes(monkeypatch)
    window_bytes = 64 * KIB
    tier = DiskTier(device=CPU, folder=tmp_path, max_in_flight_bytes=window_bytes, late=late, keep_bytes=keep_bytes)
    most_kept_bytes = 0 if late == "wait" else window_bytes if keep_bytes is None else keep_bytes
    alive: list[weakref.ref[Tensor]] = []
    stored = []
    for number in range(40):
        flat = full(16 * KIB, number)
        alive.append(weakref.ref(flat))
        stored.append(tier.put(flat))
        del flat
        assert tier.traffic().kept_bytes <= most_kept_bytes
        assert sum(each() is not None for each in alive) * 16 * KIB <= window_bytes + most_kept_bytes
    assert tier.traffic().kept_bytes == most_kept_bytes // (16 * KIB) * 16 * KIB
    assert [int(each.get()[-1]) for each in stored] == list(range(40))
    del stored
    assert tier.traffic().kept_bytes == 0
    tier.close()


def test_a_disk_that_is_not_late_keeps_nothing(tmp_path: Path) -> None:
    tier = DiskTier(device=CPU, folder=tmp_path, max_in_flight_bytes=64 * KIB, late="keep")
    for number in range(20):
        stored = tier.put(full(60 * KIB if number % 2 else 100 * KIB, number))
        tier.flush()
        assert stored.get()[0] == number
    assert tier.traffic().most_kept_bytes == 0
    tier.close()


def test_tensors_that_stay_for_being_late_free_their_room_for_others(tmp_path: Path, gate: Gate) -> None:
    tier = DiskTier(device=CPU, folder=tmp_path, max_in_flight_bytes=32 * KIB, late="keep", keep_bytes=16 * KIB)
    moving = [tier.put(full(16 * KIB, number)) for number in range(2)]
    for number in range(5):
        kept = tier.put(full(16 * KIB, 7 + number))
        assert tier.traffic().kept_bytes == 16 * KIB
        assert kept.prefetch() and kept.get()[0] == 7 + number
        del kept  # else the next would wait for the gate, for ever
    gate.let_pass(2)
    tier.flush()
    assert [int(each.get()[0]) for each in moving] == [0, 1]
    assert tier.traffic().bytes_out == 32 * KIB
    tier.close()


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("choice", ["offload", "compress+offload:mask"])
def test_a_step_on_a_slow_disk_has_the_same_gradients_whether_it_waits_or_keeps(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_writes(monkeypatch)
    model, batch = small_model()
    wanted = gradients(model, batch)
    for late in LATE:
        tier = DiskTier(device=CPU, max_in_flight_bytes=12 * KIB, late=late)
        with Engine(model, {"*": choice}, tier=tier, min_bytes=0):
            for _ in range(3):
                assert all(map(torch.equal, wanted, gradients(model, batch)))
            traffic = tier.traffic()
        assert traffic.kept_bytes == 0
        assert traffic.most_kept_bytes <= (12 * KIB if late == "keep" else 0)
        assert traffic.most_kept_bytes > 0 or late != "keep" or choice != "offload"


def small_model() -> tuple[nn.Module, Tensor]:
    layers = [each for _ in range(4) for each in (nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32))]
    return nn.Sequential(*layers), torch.randn(16, 32)


def gradients(model: nn.Module, batch: Tensor, *, tier: DiskTier | None = None) -> list[Tensor]:
    """Return the loss and the gradients of a step; with a tier, all is moved, or has failed, when backward begins."""
    model.zero_grad()
    loss = model(batch).square().sum()
    if tier is not None:
        tier.flush()
    loss.backward()
    return [loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


def test_a_tensor_larger_than_the_bound_moves_alone(tier: DiskTier) -> None:
    stored = [tier.put(full(100 * KIB, number)) for number in range(3)]
    assert [int(each.get()[-1]) for each in stored] == [0, 1, 2]
    assert not stored[0].prefetch()


def test_reads_go_before_writes_that_wait(tier: DiskTier, gate: Gate) -> None:
    first = tier.put(full(8, 1))
    assert gate.begun.acquire(timeout=60)
    gate.let_pass(1)
    tier.flush()
    others = [tier.put(full(8, 2)) for _ in range(5)]
    for _ in range(2):  # both threads are at the gate, three writes queue
        assert gate.begun.acquire(timeout=60)
    assert first.prefetch()
    gate.let_pass(1)
    assert first.get()[0] == 1
    assert sum(each._record.source is not None for each in others) >= 3  # type: ignore[attr-defined]
    gate.let_pass(4)
    tier.flush()


def test_a_tensor_freed_while_it_is_written_keeps_its_space_until_then(tier: DiskTier, gate: Gate) -> None:
    first = tier.put(full(4096, 1))
    assert gate.begun.acquire(timeout=60)
    first.free()
    second = tier.put(full(4096, 2))
    assert tier.traffic().stored_bytes == 2 * 4096, "the second got the space that is still written to"
    gate.let_pass(2)
    tier.flush()
    assert tier.traffic().stored_bytes == 4096
    assert second.get()[0] == 2


def test_a_tensor_freed_before_it_is_written_is_not(tier: DiskTier, gate: Gate) -> None:
    held = [tier.put(full(4096, number)) for number in range(4)]
    for _ in range(2):
        assert gate.begun.acquire(timeout=60)
    del held[2:]  # those that still queue
    gate.let_pass(2)
    tier.flush()
    assert tier.traffic().bytes_out == 2 * 4096


def test_the_file_does_not_grow_where_space_is_free(tier: DiskTier) -> None:
    for _ in range(1000):
        stored = [tier.put(full(size, 3)) for size in (5000, 1, 9000)]
        tier.flush()
        del stored
    assert os.fstat(file_descriptor(tier)).st_size <= 6 * 4096


def test_a_small_bound_makes_room_as_soon_as_writes_end(tmp_path: Path) -> None:
    tier = DiskTier(device=CPU, folder=tmp_path, max_bytes=4096)
    for number in range(200):
        stored = tier.put(full(4096, number))
        assert stored.get()[0] == number
        stored.free()
    tier.close()


@pytest.mark.parametrize("size", [1, 5000, 5 * KIB * KIB])
def test_bytes_that_changed_on_the_disk_are_an_error(tier: DiskTier, size: int) -> None:
    stored = tier.put(full(size, 7))
    tier.flush()
    with open(f"/proc/self/fd/{file_descriptor(tier)}", "r+b") as file:
        file.seek(size - 1)
        file.write(b"\x06")
    assert stored.prefetch() == (size <= tier.max_in_flight_bytes)
    for _ in range(2):
        with pytest.raises(OffloadError, match=f"{tier._file.folder} read [0-9]+ bytes with checksum"):
            stored.get()


def test_a_file_that_ends_early_is_an_error(tier: DiskTier) -> None:
    stored = tier.put(full(5000, 7))
    tier.flush()
    os.truncate(f"/proc/self/fd/{file_descriptor(tier)}", 4096)
    with pytest.raises(OffloadError, match="the file ends early"):
        stored.get()


def fail_writes(monkeypatch: pytest.MonkeyPatch, code: int, *, after: int = 0) -> None:
    numbers, pwrite_ = itertools.count(), os.pwrite

    def pwrite(fd: int, chunk: memoryview, offset: int) -> int:
        if next(numbers) < after:
            return pwrite_(fd, chunk, offset)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("call", ["put", "flush", "get"])
@pytest.mark.parametrize(("code", "cause"), [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EIO, "fail")])
def test_a_disk_that_refuses_is_told_to_the_next_caller_and_nothing_is_lost(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, code: int, cause: str, call: str
) -> None:
    before = tier.put(full(4096, 1))
    tier.flush()
    with monkeypatch.context() as patch:
        fail_writes(patch, code)
        lost = tier.put(full(5000, 2))
        wait_for_failure(tier)
    calls = {"put": lambda: tier.put(full(1, 3)), "flush": tier.flush, "get": before.get}
    with pytest.raises(OffloadError, match=f"{tier._file.folder} {cause}.* 5000 bytes were to be.*4096 are stored"):
        calls[call]()
    assert torch.equal(lost.get(), full(5000, 2))
    assert torch.equal(before.get(), full(4096, 1))
    assert tier.put(full(10, 4)).get().sum() == 40, "the tier goes on where the disk does"
    tier.flush()


def test_flush_tells_of_a_failure_when_nothing_is_under_way_any_more(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(monkeypatch, errno.EIO)
    slow_writes(monkeypatch)
    lost = [tier.put(full(KIB, number)) for number in range(6)]
    wait_for_failure(tier)
    with pytest.raises(OffloadError, match="failed"):
        tier.flush()
    tier.flush()
    assert [int(each.get()[-1]) for each in lost] == list(range(6))


def wait_for_failure(tier: DiskTier) -> None:
    with tier._changed:
        assert tier._changed.wait_for(lambda: tier._failure is not None, timeout=60)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("num_good", [0, 5])
def test_a_disk_that_fails_in_the_middle_of_a_step_changes_no_gradient_if_told_to_keep(
    num_good: int, late: Late, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = small_model()
    wanted = gradients(model, batch)
    tier = DiskTier(device=CPU, folder=tmp_path, max_in_flight_bytes=12 * KIB, on_full="keep", late=late)
    with Engine(model, {"*": "offload"}, tier=tier, min_bytes=0):
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match=f"{tmp_path} failed") as warned:
            fail_writes(patch, errno.EIO, after=num_good)
            found = gradients(model, batch, tier=tier)
        assert len(warned) == 1
        assert all(map(torch.equal, wanted, found))
        kept = tier.traffic()
        assert kept.kept_bytes == kept.stored_bytes == 0 < kept.most_kept_bytes
        assert all(map(torch.equal, wanted, gradients(model, batch))), "the disk is well again"
        assert tier.traffic().bytes_out > kept.bytes_out


@pytest.mark.usefixtures("seed")
def test_a_disk_that_fails_in_the_middle_of_a_step_stops_it_and_the_next_step_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = small_model()
    wanted = gradients(model, batch)
    tier = DiskTier(device=CPU, folder=tmp_path, max_in_flight_bytes=12 * KIB)
    with Engine(model, {"*": "offload"}, tier=tier, min_bytes=0):
        with monkeypatch.context() as patch:
            fail_writes(patch, errno.EIO, after=7)
            with pytest.raises(OffloadError, match=f"{tmp_path} failed .*name another folder"):
                gradients(model, batch, tier=tier)
            with suppress(OffloadError):
                tier.flush()  # writes that were under way fail as well
        gc.collect()  # the error's frames hold the graph
        assert all(map(torch.equal, wanted, gradients(model, batch)))
        tier.flush()  # backward may end before a write does
        assert (tier.traffic().kept_bytes, tier.traffic().stored_bytes) == (0, 0)


def test_a_disk_that_refuses_leaves_tensors_in_memory_if_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = DiskTier(device=CPU, folder=tmp_path, on_full="keep")
    fail_writes(monkeypatch, errno.ENOSPC)
    with pytest.warns(UserWarning, match=f"stay on cpu and are not offloaded: .*{tmp_path} is full") as warned:
        stored = [tier.put(full(5000, number)) for number in range(4)]
        tier.flush()
    assert len(warned) == 1
    assert [int(each.get()[0]) for each in stored] == [0, 1, 2, 3]
    assert tier.traffic().stored_bytes == 0
    tier.close()


def test_a_write_that_stops_halfway_is_continued(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: 3 * 4096], offset))
    flat = torch.arange(30_000)
    assert torch.equal(tier.put(flat).get(), flat)
    stored = tier.put(flat)
    tier.flush()
    assert torch.equal(stored.get(), flat)


def in_child(text: str) -> "subprocess.Popen[str]":
    program = f"import torch\nfrom packlight.activations.offload import *\n{text}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )


LIMITED = """
import resource, sys
tier = make_tier("disk", device=torch.device("cpu"), folder=sys.argv[1] if sys.argv[1:] else None)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
stored = [tier.put(torch.full((2**18,), n, dtype=torch.float32)) for n in range(2)]
try:
    tier.flush()
except OffloadError as error:
    print(error)
print([int(each.get()[-1]) for each in stored])
tier.close()
"""


def test_a_real_limit_of_the_system_is_met_likewise() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    with in_child(LIMITED) as child:
        told, _ = child.communicate()
    assert "is full (File too large): 1048576 bytes were to be" in told
    assert told.endswith("[0, 1]\n")
    assert child.returncode == 0


KILLED = """
import os, sys, time
tier = make_tier("disk", device=torch.device("cpu"))
stored = tier.put(torch.ones(10**6))
tier.flush()
print(len(os.listdir("/proc/self/fd")), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("name", ["O_TMPFILE", "none"])
def test_a_killed_process_leaves_no_file(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    unsupported = "" if name == "O_TMPFILE" else "import packlight.activations.spill as s\ns.O_TMPFILE = 0\n"
    with in_child(unsupported + KILLED) as child:
        assert child.stdout is not None
        assert int(child.stdout.readline()) > 3
        assert not list(tmp_path.iterdir())
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_an_interpreter_that_ends_without_close_ends() -> None:
    text = 'tier = make_tier("disk", device=torch.device("cpu"))\nstored = tier.put(torch.ones(10**6))'
    with in_child(text) as child:
        told, _ = child.communicate(timeout=120)
    assert (child.returncode, told) == (0, "")


@pytest.mark.parametrize("missing", ["O_TMPFILE", "O_DIRECT", "both", "O_DIRECT at the first write"])
def test_what_a_file_system_lacks_is_done_without(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    os_open = os.open

    def open_(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if missing in {"O_DIRECT", "both"} and flags & spill.O_DIRECT:
            fd = os_open(path, flags & ~spill.O_DIRECT, mode) if flags & os.O_CREAT else None  # Linux makes the file
            if fd is not None:
                os.close(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        if missing in {"O_TMPFILE", "both"} and flags & spill.O_TMPFILE == spill.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return os_open(path, flags, mode)

    monkeypatch.setattr(os, "open", open_)
    if missing == "O_DIRECT at the first write":
        monkeypatch.setattr(spill, "_takes_direct", lambda fd: False)
    before = len(os.listdir("/proc/self/fd"))
    tier = DiskTier(device=CPU, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert tier.direct == (missing == "O_TMPFILE" and SpillFile(tmp_path).direct)
    stored = tier.put(torch.arange(10_000))
    tier.flush()
    assert torch.equal(stored.get(), torch.arange(10_000))
    tier.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_file_is_private(tier: DiskTier) -> None:
    status = os.fstat(file_descriptor(tier))
    assert status.st_mode & 0o777 == 0o600
    assert status.st_nlink == 0
    assert not os.get_inheritable(file_descriptor(tier))


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or not is_in_memory(Path("/dev/shm")), reason="no tmpfs here")
def test_a_folder_in_memory_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="/dev/shm lies in memory"):
        tier = make_tier("disk", device=CPU, folder="/dev/shm")
    tier.close()


def test_space_is_given_out_by_the_page(tier: DiskTier) -> None:
    stored = [tier.put(full(size, 0)) for size in (1, 4096, 4097)]
    model = Extents(alignment=4096)
    for each in stored:
        model.allocate(each.num_bytes)
    tier.flush()
    assert tier.traffic().stored_bytes == model.used_bytes == 4 * 4096


def test_threads_that_wait_for_a_steady_disk_to_be_empty_all_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_writes(monkeypatch)
    tier = DiskTier(device=CPU, max_in_flight_bytes=64 * KIB, late="steady")
    stored = [tier.put(torch.full((KIB,), at, dtype=torch.uint8)) for at in range(3)]
    with ThreadPoolExecutor(4) as pool:
        for waited in [pool.submit(tier.flush) for _ in range(4)]:
            waited.result(timeout=60)
    assert [int(each.get()[0]) for each in stored] == [0, 1, 2]
    tier.close()


def test_a_steady_disk_that_cannot_begin_a_copy_says_so_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DiskTier(device=CPU, max_in_flight_bytes=64 * KIB, late="steady")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="can't start new thread"):
        patch.setattr(tier._pool._executor, "submit", _no_thread)
        tier.put(torch.ones(KIB))
    tier.flush()
    assert torch.equal(tier.put(torch.ones(KIB)).get(), torch.ones(KIB))
    tier.close()


def _no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")
