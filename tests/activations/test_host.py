"""The host tier alone: the order of its copies, its slabs, and the CUDA calls, with stand-ins where there is no GPU."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from packlight.activations import pages
from packlight.activations.copies import StreamCopier, lend, make_copier, stamp, wait_for
from packlight.activations.host import HostTier
from packlight.activations.offload import OffloadError
from packlight.activations.pages import Pages
from packlight.activations.slabs import SLAB_BYTES, Slabs
from packlight.activations.staging import DeviceStaging
from tests.cases import DEVICES

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB = 2**20


@dataclass
class SlowCopier:
    """Copies at once and says so only when told; notes who asked for what."""

    log: list[str] = field(default_factory=list)
    num_done: int = 0
    num_begun: int = 0

    def copy(self, target: Tensor, source: Tensor) -> "SlowCopy":
        target.copy_(source)
        self.log.append(f"copy {self.num_begun}")
        self.num_begun += 1
        return SlowCopy(self, self.num_begun - 1)

    def wait(self) -> None:
        self.log.append("wait for all")


@dataclass
class SlowCopy:
    copier: SlowCopier
    number: int

    def is_done(self) -> bool:
        return self.number < self.copier.num_done

    def wait(self) -> None:
        self.copier.log.append(f"wait {self.number}")
        self.copier.num_done = max(self.copier.num_done, self.number + 1)

    def order(self) -> None:
        self.copier.log.append(f"order {self.number}")

    def lend(self, result: Tensor) -> Tensor:
        self.copier.log.append(f"lend {self.number}")
        return result

    def seconds(self) -> float:
        assert self.is_done()
        return 2.0


@pytest.fixture
def copier() -> SlowCopier:
    return SlowCopier()


@pytest.fixture
def tier(copier: SlowCopier) -> Iterator[HostTier]:
    tier = HostTier(device=CPU, max_in_flight_bytes=3 * MIB, max_bytes=8 * MIB, copier=copier)
    yield tier
    tier.close()


def flat(value: int) -> Tensor:
    return torch.full((MIB,), value, dtype=torch.uint8)


def test_at_the_bound_the_device_waits_for_the_oldest_copy_and_the_host_does_not(
    tier: HostTier, copier: SlowCopier
) -> None:
    alive, stored = [], []
    for number in range(5):
        tensor = flat(number)
        alive.append(weakref.ref(tensor))
        stored.append(tier.put(tensor))
        del tensor
    assert copier.log == ["copy 0", "copy 1", "copy 2", "order 0", "copy 3", "order 1", "copy 4"]
    assert [each() is None for each in alive] == [True, True, False, False, False]


def test_tensors_whose_copies_are_done_are_dropped_without_any_wait(tier: HostTier, copier: SlowCopier) -> None:
    alive, stored = [], []
    for number in range(5):
        tensor = flat(number)
        alive.append(weakref.ref(tensor))
        stored.append(tier.put(tensor))
        copier.num_done = number
        del tensor
    assert copier.log == [f"copy {number}" for number in range(5)]
    assert [each() is None for each in alive] == [True, True, True, False, False]


def test_flush_makes_the_host_wait(tier: HostTier, copier: SlowCopier) -> None:
    stored = [tier.put(flat(number)) for number in range(2)]
    tier.flush()
    assert copier.log == ["copy 0", "copy 1", "wait 0", "wait 1"]
    assert tier.traffic().seconds_out == 4.0
    assert stored[1].get()[0] == 1


def test_what_comes_back_is_lent_once_and_what_is_abandoned_is_ordered(tier: HostTier, copier: SlowCopier) -> None:
    stored = [tier.put(flat(number)) for number in range(2)]
    tier.flush()
    copier.log.clear()
    assert stored[0].prefetch() and stored[1].prefetch()
    assert stored[0].get()[0] == 0
    stored[1].free()
    assert copier.log == ["copy 2", "copy 3", "lend 2", "order 3"]
    copier.num_done = 4
    assert tier.traffic().bytes_in == 2 * MIB
    assert tier.traffic().seconds_in == 4.0


def test_a_slot_freed_while_its_copy_runs_is_not_given_out_before(tier: HostTier, copier: SlowCopier) -> None:
    tier.put(flat(0)).free()
    assert tier.traffic().stored_bytes == MIB
    copier.num_done = 1
    assert tier.traffic().stored_bytes == 0


def test_a_full_tier_waits_where_slots_of_freed_tensors_come_back(copier: SlowCopier) -> None:
    tier = HostTier(device=CPU, max_bytes=3 * MIB, copier=copier)
    held = [tier.put(flat(number)) for number in range(3)]
    copier.log.clear()
    with pytest.raises(OffloadError, match="is full"):
        tier.put(flat(8))
    assert copier.log == []
    held.pop()
    held.append(tier.put(flat(9)))
    assert copier.log == ["wait 0", "wait 1", "wait 2", "copy 3"]
    assert held[-1].get()[0] == 9
    tier.close()


def test_close_gives_up_memory_behind_the_last_copy(tier: HostTier, copier: SlowCopier) -> None:
    stored = tier.put(flat(1))
    assert tier._slabs.num_bytes == 8 * MIB
    tier.close()
    assert copier.log == ["copy 0", "wait 0", "wait for all"]
    assert tier._slabs.num_bytes == 0
    stored.free()
    tier.close()
    assert copier.log[-1] == "wait for all" and len(copier.log) == 3


def test_a_tier_that_nobody_refers_to_waits_for_its_copies(copier: SlowCopier) -> None:
    tier = HostTier(device=CPU, copier=copier)
    stored = tier.put(flat(1))
    del tier, stored
    gc.collect()
    assert copier.log == ["copy 0", "wait for all"]


def test_a_copy_that_cannot_begin_leaves_nothing_behind(
    tier: HostTier, copier: SlowCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(target: Tensor, source: Tensor) -> SlowCopy:
        raise RuntimeError("out of streams")

    with monkeypatch.context() as patch:
        patch.setattr(copier, "copy", refuse)
        with pytest.raises(RuntimeError, match="out of streams"):
            tier.put(flat(1))
    assert tier.traffic().stored_bytes == 0
    tier.flush()
    assert tier.put(flat(2)).get()[0] == 2


def test_slabs_are_large_and_slots_keep_to_the_bound() -> None:
    slabs = Slabs(CPU, max_bytes=SLAB_BYTES + 3 * MIB + 100)
    first, second = slabs.allocate(1), slabs.allocate(513)
    assert first is not None and second is not None
    assert slabs.num_bytes == SLAB_BYTES
    assert slabs.used_bytes == 512 + 1024
    assert [slot.memory(1).data_ptr() % 512 for slot in (first, second)] == [0, 0]
    assert slabs.allocate(4 * MIB) is not None
    assert slabs.allocate(SLAB_BYTES) is None
    assert slabs.allocate(SLAB_BYTES - 5 * MIB) is not None
    assert slabs.allocate(3 * MIB) is not None
    assert slabs.num_bytes == SLAB_BYTES + 3 * MIB
    slabs.close()


def test_a_request_above_the_slab_gets_one_of_its_size() -> None:
    slabs = Slabs(CPU, max_bytes=None)
    assert slabs.allocate(SLAB_BYTES + 5) is not None
    assert slabs.num_bytes == SLAB_BYTES + 4096
    slabs.close()


# The CUDA calls, with stand-ins for CUDA


class FakeCuda:
    """Notes calls; addresses that are registered; a code that the next registration fails with."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.registered: dict[int, int] = {}
        self.code = 0
        self.current = FakeStream(self, "compute")

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert (address % 4096, num_bytes % 4096, flags) == (0, 0, 1)
        if not self.code:
            self.registered[address] = num_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, None) else 713


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str = "side") -> None:
        self.cuda, self.name, self.device = cuda, name, CPU

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "FakeEvent") -> None:
        self.cuda.log.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self.cuda.log.append(f"host waits for {self.name}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda, **options: bool) -> None:
        self.cuda, self.name = cuda, "+".join(options)

    def record(self, stream: FakeStream) -> None:
        self.name = f"event of {stream.name}"
        self.cuda.log.append(f"{self.name}")

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.cuda.log.append(f"host waits for {self.name}")

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 3000.0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()

    @contextmanager
    def stream(inner: FakeStream) -> Iterator[None]:
        cuda.log.append(f"in {inner.name}")
        yield

    stand_ins: dict[str, Any] = {
        "cudart": lambda: cuda,
        "device": nullcontext,
        "stream": stream,
        "Stream": lambda device: FakeStream(cuda),
        "Event": lambda **options: FakeEvent(cuda, **options),
        "current_stream": lambda device: cuda.current,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(pages, "_node_of", lambda device: 0)
    return cuda


def test_memory_is_registered_and_unregistered_once(cuda: FakeCuda) -> None:
    slabs = Slabs(CUDA, max_bytes=None)
    for _ in range(3):
        assert slabs.allocate(40 * MIB) is not None
    assert list(cuda.registered.values()) == [SLAB_BYTES] * 3
    slabs.close()
    slabs.close()
    assert not cuda.registered
    held = Pages(5000, CUDA)
    assert list(cuda.registered.values()) == [8192]
    del held
    assert not cuda.registered, "collected pages stay registered"


def test_memory_that_cannot_be_registered_is_pinned_by_torch_with_a_warning(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.code = 2
    empty = torch.empty
    cleared: list[torch.device] = []
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options))
    monkeypatch.setattr(pages, "_forget_last_error", cleared.append)
    with pytest.warns(UserWarning, match=r"cudaHostRegister refused 8192 bytes \(error 2\); torch's pin_memory"):
        memory = Pages(5000, CUDA)
    assert cleared == [CUDA]
    assert memory.tensor.numel() == 8192
    memory.close()


@pytest.mark.filterwarnings("ignore:cudaHostRegister refused")
def test_a_host_without_pinned_memory_is_told(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    cuda.code = 2
    monkeypatch.setattr(pages, "_forget_last_error", lambda device: None)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(OffloadError, match=r"no 8192 bytes of pinned memory .*smaller budget"):
        Pages(5000, CUDA)


def test_a_copy_waits_for_compute_before_it_and_compute_for_it_after(cuda: FakeCuda) -> None:
    copier = StreamCopier(CUDA)
    target = torch.zeros(8, dtype=torch.uint8)
    copy = copier.copy(target, torch.ones(8, dtype=torch.uint8))
    assert cuda.log == ["side waits for compute", "in side", "event of side", "event of side"]
    assert target.sum() == 8
    cuda.log.clear()
    assert copy.lend(target) is target
    copy.order()
    copy.wait()
    copier.wait()
    assert cuda.log == ["compute waits for event of side"] * 2 + ["host waits for event of side", "host waits for side"]
    assert copy.is_done() and copy.seconds() == 3.0


def test_a_result_used_on_another_stream_is_recorded_there(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append(stream.name))
    copy = StreamCopier(CUDA).copy(torch.zeros(1), torch.ones(1))
    cuda.current = FakeStream(cuda, "other")
    cuda.log.clear()
    copy.lend(torch.zeros(1))
    assert cuda.log == ["compute waits for event of side", "other waits for event of side"]
    assert recorded == ["other"]


def test_staging_waits_for_its_copies(cuda: FakeCuda) -> None:
    staging = DeviceStaging(CUDA)
    part, back = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    chunk = staging.load(part)
    assert len(chunk) == 4096 and bytes(chunk[:100]) == bytes(range(100))
    staging.unload(back)
    assert torch.equal(back, part)
    assert cuda.log == ["in side", "host waits for side"] * 2
    staging.close()
    assert not cuda.registered


def test_a_stamp_says_how_far_a_stream_has_come(cuda: FakeCuda) -> None:
    event = stamp(CUDA)
    wait_for(event)
    assert cuda.log == ["event of compute", "host waits for event of compute"]
    assert stamp(CPU) is None
    wait_for(None)
    assert lend(torch.ones(1), None).sum() == 1


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_registered_memory_is_pinned_for_torch() -> None:
    slabs = Slabs(CUDA, max_bytes=None)
    slot = slabs.allocate(5000)
    assert slot is not None
    assert slot.memory(5000).is_pinned()
    copier = make_copier(CUDA)
    source = torch.arange(5000, device=CUDA).to(torch.uint8)
    copier.copy(slot.memory(5000), source)
    copier.wait()
    assert torch.equal(slot.memory(5000), source.cpu())
    slabs.close()
