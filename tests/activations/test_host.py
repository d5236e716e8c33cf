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

from packlight.activations import copies, pages, shelf
from packlight.activations.copies import StreamCopier, is_capturing, lend, make_copier, stamp, wait_for
from packlight.activations.extents import round_up
from packlight.activations.groups import Group
from packlight.activations.host import HostTier
from packlight.activations.offload import OffloadError, Stored
from packlight.activations.pages import Pages
from packlight.activations.slabs import LARGE_BYTES, SLAB_BYTES, Slabs
from packlight.activations.staging import CHUNK_BYTES, DeviceStaging
from tests.cases import DEVICES

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB = 2**20


@dataclass
class SlowCopier:
    """Copies at once and says so only when told; notes who asked for what."""

    log: list[str] = field(default_factory=list)
    num_done: int = 0
    num_ready: int = 1000
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

    def is_ready(self) -> bool:
        return self.number < self.copier.num_ready

    def is_done(self) -> bool:
        return self.number < self.copier.num_done

    def wait(self) -> None:
        self.copier.log.append(f"wait {self.number}")
        self.copier.num_done = max(self.copier.num_done, self.number + 1)

    def order(self) -> None:
        self.copier.log.append(f"order {self.number}")

    def settle(self) -> None:
        self.copier.log.append(f"settle {self.number}")

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


def put_alone(tier: HostTier, num: int) -> tuple[list[weakref.ref[Tensor]], list[Stored]]:
    """Put tensors that nobody else holds; return whether they live, and what brings them back."""
    tensors = [flat(number) for number in range(num)]
    alive = [weakref.ref(tensor) for tensor in tensors]
    return alive, [tier.put(tensors.pop(0)) for _ in range(num)]


def test_at_the_bound_the_device_waits_for_the_oldest_copy_and_the_host_does_not(
    tier: HostTier, copier: SlowCopier
) -> None:
    alive, _stored = put_alone(tier, 5)
    assert copier.log == ["copy 0", "copy 1", "copy 2", "settle 0", "copy 3", "settle 1", "copy 4"]
    assert [each() is None for each in alive] == [True, True, False, False, False]


def test_draining_drops_every_tensor_behind_its_copy_and_the_host_waits_for_none(
    tier: HostTier, copier: SlowCopier
) -> None:
    alive, stored = put_alone(tier, 3)
    tier.drain()
    assert copier.log == ["copy 0", "copy 1", "copy 2", "settle 0", "settle 1", "settle 2"]
    assert all(each() is None for each in alive)
    assert tier._in_flight_bytes == 0
    tier.drain()  # nothing is under way
    assert len(copier.log) == 6
    assert [int(each.get()[0]) for each in stored] == [0, 1, 2]


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


def test_tensors_stay_where_copies_are_late_as_long_as_the_bound_allows(copier: SlowCopier) -> None:
    tier = HostTier(device=CPU, max_in_flight_bytes=2 * MIB, late="keep", keep_bytes=2 * MIB, copier=copier)
    stored = [tier.put(flat(number)) for number in range(5)]
    assert copier.log == ["copy 0", "copy 1", "settle 0", "copy 2"], "the third and the fourth stay, the fifth waits"
    assert tier.traffic().kept_bytes == 2 * MIB
    assert [int(each.get()[0]) for each in stored] == list(range(5))
    stored[2].free()
    assert tier.traffic().kept_bytes == MIB
    copier.num_done = copier.num_begun
    stored.append(tier.put(flat(5)))
    assert copier.log[-1] == f"copy {copier.num_begun - 1}", "the link is not late any more"
    del stored
    assert (tier.traffic().kept_bytes, tier.traffic().most_kept_bytes) == (0, 2 * MIB)
    tier.close()


def test_copies_that_compute_has_not_come_to_are_not_late(copier: SlowCopier) -> None:
    tier = HostTier(device=CPU, max_in_flight_bytes=2 * MIB, late="keep", copier=copier)
    copier.num_ready = 1  # the host is early: compute is at the second tensor, and the link copies the first
    stored = [tier.put(flat(number)) for number in range(4)]
    assert copier.log == ["copy 0", "copy 1", "settle 0", "copy 2", "settle 1", "copy 3"]
    copier.num_ready = 2
    stored.append(tier.put(flat(4)))
    assert tier.traffic().kept_bytes == MIB
    tier.close()


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
    assert tier.traffic().pinned_bytes == 8 * MIB
    tier.close()
    assert copier.log == ["copy 0", "wait 0", "wait for all"]
    assert tier.traffic().pinned_bytes == 0
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


def test_the_second_step_pins_what_the_first_one_used_and_waits_for_copies_before(copier: SlowCopier) -> None:
    tier = HostTier(device=CPU, copier=copier)
    for _ in range(3):
        stored = [tier.put(flat(number)) for number in range(3)]
        tier.flush()
        assert [int(each.get()[0]) for each in stored] == [0, 1, 2]
        del stored
    assert [line for line in copier.log if line == "wait for all"] == ["wait for all"]
    assert copier.log.index("wait for all") == copier.log.index("lend 5") + 1
    traffic = tier.traffic()
    assert (traffic.stored_bytes, traffic.pinned_bytes) == (0, 3 * MIB) == (0, traffic.most_stored_bytes)
    tier.close()


def test_large_tensors_waste_no_pinned_memory() -> None:
    slabs = Slabs(CPU, max_bytes=None)
    slots = [slabs.allocate(40 * MIB) for _ in range(3)]
    assert slabs.num_bytes == slabs.used_bytes == 120 * MIB
    for slot in slots:
        assert slot is not None
        slabs.release(slot)
    assert not slabs.is_wasteful, "pinning anew costs time and would save nothing"
    slabs.close()


def test_slabs_are_fitted_to_what_the_steps_before_used_and_within_the_bound(copier: SlowCopier) -> None:
    tier = HostTier(device=CPU, max_bytes=SLAB_BYTES + 3 * MIB, copier=copier)

    def pinned_bytes(*sizes: int) -> int:
        """Store these; return what is pinned when the next step begins."""
        stored = [tier.put(torch.ones(size, dtype=torch.uint8)) for size in sizes]
        assert all(each.get().all() for each in stored)
        assert tier.traffic().pinned_bytes <= SLAB_BYTES + 3 * MIB
        tier.flush()
        del stored
        tier.put(torch.ones(1)).free()
        tier.flush()
        return tier.traffic().pinned_bytes

    few, many = (MIB, 3 * MIB, 700), (MIB, 3 * MIB, 700, 6 * MIB)
    assert [pinned_bytes(*few) for _ in range(2)] == [4 * MIB + 4096] * 2
    assert pinned_bytes(*many) == 10 * MIB + 4096, "the tensor that came anew fills a slab of its own"
    assert pinned_bytes(20 * MIB) == 20 * MIB
    assert pinned_bytes(60 * MIB, 3 * MIB) == 63 * MIB, "slabs of former sizes are in the way of none"
    tier.close()


def test_memory_that_a_step_cannot_lay_out_better_is_not_pinned_anew_each_step() -> None:
    slabs = Slabs(CPU, max_bytes=None)
    num_fits = 0
    for _ in range(5):
        first, second = slabs.allocate(8 * MIB), slabs.allocate(4 * MIB)
        assert first is not None and second is not None
        slabs.release(first)  # its gap of 8 MiB is too short for the next one
        third = slabs.allocate(9 * MIB)
        assert third is not None
        slabs.release(second)
        slabs.release(third)
        if slabs.is_wasteful:
            slabs.fit()
            num_fits += 1
    assert num_fits == 1
    assert slabs.num_bytes == 13 * MIB + 9 * MIB
    slabs.close()


def test_shared_slabs_are_large_and_slots_keep_to_the_bound() -> None:
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


@pytest.mark.parametrize("num_bytes", [LARGE_BYTES, SLAB_BYTES + 5])
def test_a_large_request_gets_a_slab_of_its_size(num_bytes: int) -> None:
    slabs = Slabs(CPU, max_bytes=None)
    assert slabs.allocate(num_bytes) is not None
    assert slabs.num_bytes == round_up(num_bytes, 4096)
    slabs.close()


# The CUDA calls, with stand-ins for CUDA


class FakeCuda:
    """Notes calls; addresses that are registered; a code that the next registration fails with."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.registered: dict[int, int] = {}
        self.code = 0
        self.current = self.default = FakeStream(self, "compute")

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
        "default_stream": lambda device: cuda.default,
        "is_current_stream_capturing": lambda: False,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(pages, "_node_of", lambda device: 0)
    return cuda


def test_memory_is_registered_and_unregistered_once(cuda: FakeCuda) -> None:
    slabs = Slabs(CUDA, max_bytes=None)
    for _ in range(3):
        assert slabs.allocate(40 * MIB) is not None
    assert list(cuda.registered.values()) == [40 * MIB] * 3
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
    slabs = Slabs(CUDA, max_bytes=None)
    with pytest.warns(UserWarning, match="torch's pin_memory is used instead"):
        slot = slabs.allocate(40 * MIB)
    assert slot is not None
    assert (slabs.num_bytes, slabs.taken_bytes) == (40 * MIB, 64 * MIB), "torch rounds up to a power of two"
    slabs.release(slot)
    assert not slabs.is_wasteful, "torch gives nothing back"
    slabs.close()


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
    before = ["event of compute", "side waits for event of compute"]
    assert cuda.log == [*before, "in side", "event of side", "event of side"]
    assert target.sum() == 8
    cuda.log.clear()
    assert copy.lend(target) is target
    copy.order()
    copy.wait()
    copier.wait()
    assert cuda.log == ["compute waits for event of side"] * 2 + ["host waits for event of side", "host waits for side"]
    assert copy.is_ready() and copy.is_done() and copy.seconds() == 3.0


def test_a_source_is_dropped_behind_the_default_stream_and_on_another_one_behind_the_copy(cuda: FakeCuda) -> None:
    copier = StreamCopier(CUDA)
    copier.copy(torch.zeros(1), torch.ones(1)).settle()
    assert cuda.log[-1] == "compute waits for event of side"
    cuda.current = FakeStream(cuda, "other")
    copier.copy(torch.zeros(1), torch.ones(1)).settle()
    assert cuda.log[-1] == "host waits for event of side", "the memory may be another stream's, which does not wait"


def test_a_result_used_on_another_stream_is_recorded_there(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append(stream.name))
    copy = StreamCopier(CUDA).copy(torch.zeros(1), torch.ones(1))
    cuda.current = FakeStream(cuda, "other")
    cuda.log.clear()
    copy.lend(torch.zeros(1))
    assert cuda.log == ["compute waits for event of side", "other waits for event of side"]
    assert recorded == ["other"]


@dataclass
class HeldOnStream:
    """Brings a flat tensor back, and notes on which stream."""

    cuda: FakeCuda
    num_bytes: int = 16

    def get(self) -> Tensor:
        self.cuda.log.append(f"brought back on {self.cuda.current.name}")
        return torch.arange(4, dtype=torch.float32)

    def prefetch(self) -> bool:
        return True


@pytest.fixture
def recorded(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The streams that tensors were recorded on; all tensors count as a GPU's."""
    recorded: list[str] = []
    monkeypatch.setattr(copies, "present_stream", lambda device: cuda.current)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append(stream.name))
    return recorded


def take(group: Group) -> Tensor:
    return group.view((4,), (1,), 0, torch.float32)


def test_views_of_a_group_on_one_stream_wait_for_nothing(cuda: FakeCuda, recorded: list[str]) -> None:
    group = Group(torch.zeros(4).untyped_storage(), HeldOnStream(cuda))
    first = take(group)
    assert take(group).data_ptr() == first.data_ptr()
    assert cuda.log == ["event of compute", "brought back on compute", "event of compute"]
    assert not recorded


def test_a_view_on_another_stream_waits_until_the_storage_is_back_and_is_recorded(
    cuda: FakeCuda, recorded: list[str]
) -> None:
    group = Group(torch.zeros(4).untyped_storage(), HeldOnStream(cuda))
    first = take(group)
    cuda.log.clear()
    cuda.current = FakeStream(cuda, "other")
    second = take(group)
    assert second.data_ptr() == first.data_ptr()
    assert cuda.log == ["other waits for event of compute"]
    assert recorded == ["other"]


def test_what_was_encoded_on_one_stream_is_read_by_another_behind_it_and_given_back_behind_the_reading(
    cuda: FakeCuda, recorded: list[str]
) -> None:
    group = Group(torch.zeros(4).untyped_storage(), HeldOnStream(cuda))
    cuda.log.clear()
    cuda.current = FakeStream(cuda, "other")
    assert take(group).tolist() == [0, 1, 2, 3]
    reading = ["other waits for event of compute", "brought back on other", "compute waits for other"]
    assert cuda.log == [*reading, "event of other"]
    assert not recorded, "it was allocated where it is used"


def test_a_kept_tensor_is_read_on_another_stream_behind_its_own(
    cuda: FakeCuda, recorded: list[str], copier: SlowCopier
) -> None:
    tier = HostTier(device=CPU, copier=copier)
    stored = tier.put(flat(3))
    cuda.log.clear()
    cuda.current = FakeStream(cuda, "other")
    tier._moving[0][0].place = None  # it could not be moved
    assert stored.get()[0] == 3
    assert cuda.log == ["other waits for event of compute", "compute waits for other"]
    tier.close()


def test_a_call_while_a_graph_is_captured_is_an_error_that_says_so(
    copier: SlowCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = HostTier(device=CPU, copier=copier)
    stored, other = tier.put(flat(3)), tier.put(flat(4))
    copier.log.clear()
    with monkeypatch.context() as patch:
        patch.setattr(shelf, "is_capturing", lambda device: True)
        for call in (lambda: tier.put(flat(1)), stored.get, stored.prefetch, tier.flush, tier.traffic, tier.close):
            with pytest.raises(OffloadError, match=r"HostTier\('host'.* while a CUDA graph is"):
                call()
        other.free()
    assert copier.log == [], "nothing was waited for"
    assert stored.get()[0] == 3, "the tier goes on afterwards"
    tier.flush()
    assert tier.traffic().stored_bytes == MIB, "what was freed meanwhile is given up"
    tier.close()


def test_capturing_is_asked_of_a_gpu_only(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_capturing(CUDA) and not is_capturing(CPU)


def test_staging_waits_for_its_copies(cuda: FakeCuda) -> None:
    staging = DeviceStaging(CUDA)
    part, back = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    chunk = staging.load(part)
    assert len(chunk) == 4096 and bytes(chunk[:100]) == bytes(range(100))
    staging.unload(back)
    assert torch.equal(back, part)
    assert cuda.log == ["in side", "host waits for side"] * 2
    assert staging.num_bytes == sum(cuda.registered.values()) == CHUNK_BYTES
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


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_a_view_used_on_another_stream_of_a_gpu_has_its_values() -> None:
    tier, sides = HostTier(device=CUDA), [torch.cuda.Stream(CUDA) for _ in range(2)]
    for number in range(20):
        storage = torch.full((2**24,), number, dtype=torch.float32, device=CUDA)
        group = Group(storage.untyped_storage(), tier.put(storage))
        del storage
        torch.empty(2**24, device=CUDA).fill_(-1)  # may get the memory of what was let go of
        views, sums = [], []
        for side in (*sides, torch.cuda.current_stream(CUDA)):
            with torch.cuda.stream(side):
                views.append(group.view((2**24,), (1,), 0, torch.float32))
                sums.append(views[-1].sum())
        assert len({view.data_ptr() for view in views}) == 1
        del views, group
        torch.empty(2**24, device=CUDA).fill_(-1)
        torch.cuda.synchronize()
        assert [float(each) for each in sums] == [number * 2**24] * 3
    tier.close()


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_memory_of_a_stream_that_does_not_wait_is_not_overwritten_while_it_is_copied() -> None:
    tier, side = HostTier(device=CUDA, max_in_flight_bytes=2**26), torch.cuda.Stream(CUDA)
    stored = []
    for number in range(20):
        tensor = torch.full((2**24,), number, dtype=torch.float32, device=CUDA)  # memory of the default stream
        side.wait_stream(torch.cuda.current_stream(CUDA))
        with torch.cuda.stream(side):
            stored.append(tier.put(tensor))
        del tensor
        torch.empty(2**24, device=CUDA).fill_(-1)
    assert [float(each.get()[-1]) for each in stored] == list(range(20))
    tier.close()


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_a_graph_that_is_captured_refuses_the_tier_and_later_ones_do_not_suffer() -> None:
    tier, graph = HostTier(device=CUDA), torch.cuda.CUDAGraph()
    stored = tier.put(torch.ones(100, device=CUDA))
    with pytest.raises(OffloadError, match="while a CUDA graph is captured"), torch.cuda.graph(graph):
        tier.put(torch.ones(100, device=CUDA))
    assert stored.get().sum() == 100
    tier.close()
