"""What every tier promises: the bytes that were put come back, memory stays bounded, space is used again."""

import gc
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight.activations import spill
from packlight.activations.engine import Engine
from packlight.activations.offload import DiskTier, HostTier, OffloadError, make_tier
from tests.cases import DEVICES

MIB = 2**20
SIZES = [0, 1, 4095, 4097, 3 * MIB + 5]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]
AnyTier = DiskTier | HostTier
Make = Callable[..., AnyTier]


@pytest.fixture(params=[f"{kind} {device}" for device in DEVICES for kind in ("disk", "buffered", "host")])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make tiers of one kind, and close them; "buffered" is the disk tier where O_DIRECT is refused."""
    kind, device = request.param.split()
    made: list[AnyTier] = []
    if kind == "buffered":
        monkeypatch.setattr(spill, "O_DIRECT", 0)

    def make(**options: Any) -> AnyTier:
        made.append((HostTier if kind == "host" else DiskTier)(device=torch.device(device), **options))
        return made[-1]

    yield make
    for tier in made:
        tier.close()


def draw(num_elements: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Any bits, NaNs among them; a bool has two values."""
    if dtype is torch.bool:
        return torch.randint(0, 2, (num_elements,), dtype=torch.uint8).view(dtype)
    return torch.randint(0, 256, (num_elements * dtype.itemsize,), dtype=torch.uint8).view(dtype)


def same(first: Tensor, second: Tensor) -> bool:
    assert (first.dtype, first.shape) == (second.dtype, second.shape)
    return torch.equal(first.cpu().view(torch.uint8), second.cpu().view(torch.uint8))


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_come_back_as_they_were(make: Make, dtype: torch.dtype) -> None:
    tier = make()
    flats = [draw(size, dtype).to(tier.device) for size in SIZES[: 5 if dtype.itemsize == 1 else 4]]
    stored = [tier.put(flat) for flat in flats]
    tier.flush()
    for flat, each in zip(flats, stored, strict=True):
        back = each.get()
        assert back.device == flat.device
        assert each.num_bytes == flat.nbytes
        assert same(back, flat)
        assert not flat.numel() or back.data_ptr() != flat.data_ptr()


@pytest.mark.usefixtures("seed")
def test_a_tensor_comes_back_before_it_is_moved_too(make: Make) -> None:
    tier = make()
    flat = draw(MIB).to(tier.device)
    back = tier.put(flat).get()
    assert same(back, flat)
    assert back.data_ptr() != flat.data_ptr()


@pytest.mark.usefixtures("seed")
def test_a_tensor_comes_back_as_often_as_asked_for(make: Make) -> None:
    tier = make()
    flat = draw(5000).to(tier.device)
    stored = tier.put(flat)
    tier.flush()
    assert stored.prefetch()
    first = stored.get()
    first.zero_()  # it is the caller's own
    assert same(stored.get(), flat)
    assert stored.prefetch()
    assert stored.prefetch()
    assert same(stored.get(), flat)
    assert same(stored.get(), flat)


@pytest.mark.usefixtures("seed")
def test_what_is_brought_back_ahead_of_time_is_bounded(make: Make) -> None:
    tier = make(max_in_flight_bytes=2 * MIB)
    flats = [draw(MIB).to(tier.device) for _ in range(3)]
    stored = [tier.put(flat) for flat in flats]
    tier.flush()
    assert [each.prefetch() for each in stored] == [True, True, False]
    assert same(stored[0].get(), flats[0])  # gives the room of one back
    assert stored[2].prefetch()
    assert not stored[0].prefetch()
    stored[1].free()
    assert stored[0].prefetch()
    assert same(stored[0].get(), flats[0])
    assert same(stored[2].get(), flats[2])


@pytest.mark.usefixtures("seed")
def test_a_tensor_is_dropped_once_it_is_moved(make: Make) -> None:
    tier = make()
    flat = draw(5000).to(tier.device)
    alive = weakref.ref(flat)
    stored = tier.put(flat)
    del flat
    tier.flush()
    assert alive() is None
    assert stored.num_bytes == 5000


@pytest.mark.usefixtures("seed")
def test_many_threads_put_get_and_free_at_once(make: Make) -> None:
    tier = make(max_in_flight_bytes=64 * 1024)

    def work(seed: int) -> None:
        chance, held = random.Random(seed), []
        for _ in range(60):
            flat = torch.full((chance.randrange(20_000),), chance.randrange(256), dtype=torch.uint8, device=tier.device)
            held.append((tier.put(flat), flat.cpu()))
            stored, wanted = held[chance.randrange(len(held))]
            if chance.random() < 0.5:
                stored.prefetch()
            assert same(stored.get(), wanted)
            if len(held) > 5:
                held.pop(chance.randrange(len(held)))[0].free()

    with ThreadPoolExecutor(6) as pool:
        for result in pool.map(work, range(6)):
            assert result is None
    gc.collect()
    tier.flush()
    assert tier.traffic().stored_bytes == 0


@pytest.mark.usefixtures("seed")
def test_one_tensor_may_be_asked_for_by_many_threads(make: Make) -> None:
    tier = make()
    flat = draw(MIB + 3).to(tier.device)
    stored = tier.put(flat)
    tier.flush()
    stored.prefetch()
    with ThreadPoolExecutor(4) as pool:
        assert all(same(back, flat) for back in pool.map(lambda _: stored.get(), range(8)))


def test_freed_space_is_used_again(make: Make) -> None:
    tier = make(max_bytes=32 * 4096)
    for round_ in range(1000):
        stored = [tier.put(torch.empty(size, dtype=torch.uint8, device=tier.device)) for size in (5000, 1, 9000)]
        if round_ % 3:
            stored[0].free()  # by hand, the others by the garbage collector
        if round_ % 50 == 0:
            stored[2].get()
    del stored
    tier.flush()  # a write in progress holds its space
    assert tier.traffic().stored_bytes == 0
    assert 15_000 < tier.traffic().most_stored_bytes <= 32 * 4096


def test_free_may_be_called_twice_and_ends_the_tensor(make: Make) -> None:
    tier = make()
    stored = tier.put(torch.ones(5, device=tier.device))
    stored.free()
    stored.free()
    with pytest.raises(OffloadError, match="was freed"):
        stored.get()
    with pytest.raises(OffloadError, match="was freed"):
        stored.prefetch()
    tier.flush()
    assert tier.traffic().stored_bytes == 0


def test_a_tensor_collected_inside_a_call_is_freed_by_the_next_one(make: Make) -> None:
    tier = make()
    stored = tier.put(torch.ones(5, device=tier.device))
    tier.flush()
    with tier._changed:  # the garbage collector may run where this thread holds the lock
        del stored
    assert tier._stored_bytes() > 0
    assert tier.traffic().stored_bytes == 0


@pytest.mark.parametrize("when", ["while it is moved", "after it was moved"])
def test_a_tensor_modified_in_place_is_an_error_as_in_autograd(make: Make, when: str) -> None:
    tier = make()
    owner = torch.ones(10, 10, device=tier.device)
    stored = tier.put(owner.detach().view(-1))
    if when == "after it was moved":
        tier.flush()
    owner[3].add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: .*FloatTensor \[100\]"):
        stored.get()


def test_a_full_tier_says_so_and_goes_on(make: Make) -> None:
    tier = make(max_bytes=3 * 4096)
    held = [tier.put(torch.ones(4096, dtype=torch.uint8, device=tier.device)) for _ in range(2)]
    with pytest.raises(OffloadError, match=r"is full: 8192 bytes were to be stored, 8192 are.* 12288 allowed"):
        tier.put(torch.ones(8192, dtype=torch.uint8, device=tier.device))
    held.pop().free()
    held.append(tier.put(torch.ones(8192, dtype=torch.uint8, device=tier.device)))
    assert held[-1].get().sum() == 8192


@pytest.mark.usefixtures("seed")
def test_a_full_tier_keeps_tensors_if_told_so_and_warns_once(make: Make) -> None:
    tier = make(max_bytes=4096, on_full="keep")
    flats = [draw(4096).to(tier.device) for _ in range(3)]
    with pytest.warns(UserWarning, match="are not offloaded") as warned:
        stored = [tier.put(flat) for flat in flats]
    assert len(warned) == 1
    tier.flush()
    assert all(same(each.get(), flat) for each, flat in zip(stored, flats, strict=True))
    assert stored[2].prefetch()
    assert same(stored[2].get(), flats[2])
    assert tier.traffic().bytes_out == 4096


def test_what_is_kept_is_counted_until_it_is_freed(make: Make) -> None:
    tier = make(max_bytes=4096, on_full="keep")
    with pytest.warns(UserWarning, match="are not offloaded"):
        stored = [tier.put(torch.ones(4096, dtype=torch.uint8, device=tier.device)) for _ in range(3)]
    assert tier.traffic().kept_bytes == 2 * 4096
    stored[1].free()
    stored[1].free()
    assert tier.traffic().kept_bytes == 4096
    stored.clear()
    tier.flush()
    assert (tier.traffic().kept_bytes, tier.traffic().most_kept_bytes) == (0, 2 * 4096)


@pytest.mark.usefixtures("seed")
def test_a_step_has_the_same_gradients_where_a_tier_finds_room_for_a_part_of_it(make: Make) -> None:
    tier = make(max_bytes=3 * 4096, on_full="keep")
    model, batch = small_model(tier.device)
    wanted = gradients(model, batch)
    with Engine(model, {"*": "offload"}, tier=tier, min_bytes=0):
        with pytest.warns(UserWarning, match="is full") as warned:
            found = [gradients(model, batch) for _ in range(3)]
        traffic = tier.traffic()
    assert len(warned) == 1
    assert all(map(torch.equal, wanted * 3, [each for grads in found for each in grads]))
    assert 0 < traffic.bytes_out and traffic.most_stored_bytes <= 3 * 4096
    assert traffic.kept_bytes == 0 < traffic.most_kept_bytes


def small_model(device: torch.device) -> tuple[nn.Module, Tensor]:
    layers = [each for _ in range(4) for each in (nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32))]
    return nn.Sequential(*layers).to(device), torch.randn(16, 32, device=device)


def gradients(model: nn.Module, batch: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(batch).square().sum()
    loss.backward()
    return [loss.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


def test_traffic_counts_bytes_and_seconds(make: Make) -> None:
    tier = make()
    stored = [tier.put(torch.ones(size, device=tier.device)) for size in (0, 10, 5000)]
    tier.flush()
    stored[2].get()
    if tier.device.type == "cuda":
        torch.cuda.synchronize()
    traffic = tier.traffic()
    assert (traffic.bytes_out, traffic.bytes_in) == (40 + 20_000, 20_000)
    assert traffic.seconds_out > 0 and traffic.seconds_in > 0
    assert 20_040 <= traffic.stored_bytes == traffic.most_stored_bytes <= 20_040 + 2 * 4096


def test_close_ends_everything_and_may_be_called_twice(make: Make) -> None:
    before = len(os.listdir("/proc/self/fd"))
    tier = make()
    stored = [tier.put(torch.ones(5000, device=tier.device)) for _ in range(3)]
    stored[0].prefetch()
    tier.close()
    tier.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("packlight-disk-")]
    for call in (stored[0].get, stored[0].prefetch, tier.flush, partial(tier.put, torch.ones(1, device=tier.device))):
        with pytest.raises(OffloadError, match="is closed"):
            call()
    stored[0].free()
    assert tier.traffic().bytes_out <= 60_000


def test_a_tier_that_nobody_refers_to_closes_itself(make: Make) -> None:
    before = len(os.listdir("/proc/self/fd"))
    made = make.__closure__
    assert made is not None
    tier = make()
    stored = tier.put(torch.ones(5000, device=tier.device))
    tier.flush()
    gone = weakref.ref(tier)
    next(cell for cell in made if isinstance(cell.cell_contents, list)).cell_contents.clear()
    del tier
    assert gone() is not None and stored.get().sum() == 5000, "a stored tensor needs its tier"
    del stored
    gc.collect()
    assert gone() is None
    assert len(os.listdir("/proc/self/fd")) == before  # its threads are the fixture's to miss


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12
def test_a_forked_process_is_refused(make: Make) -> None:
    tier = make()
    stored = tier.put(torch.ones(5, device=tier.device))
    tier.flush()
    another = torch.ones(1, device=tier.device)
    tier._changed.acquire()  # as if another thread were in a call
    pid = os.fork()
    if not pid:
        os._exit(refusals(tier, stored, another))
    tier._changed.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    assert stored.get().sum() == 5


def refusals(tier: AnyTier, stored: Any, another: Tensor) -> int:
    count = 0
    for call in (stored.get, stored.prefetch, tier.flush, partial(tier.put, another)):
        try:
            call()
        except OffloadError as error:
            count += "forked process" in str(error)
        except BaseException:
            return 99
    stored.free()
    tier.close()
    return count


@pytest.mark.parametrize(
    ("flat", "reason"),
    [
        (torch.ones(2, 2), "not 1-D"),
        (torch.ones(4)[::2], "not 1-D and contiguous"),
        (torch.ones(4, requires_grad=True), "not detached"),
        (torch.ones(4, dtype=torch.complex64).conj(), "lazy conjugate"),
        (torch.ones(4, device="meta"), "on meta"),
        (torch.nn.Parameter(torch.ones(4), requires_grad=False), "not a plain tensor"),
    ],
)
def test_what_is_no_plain_flat_tensor_is_refused(flat: Tensor, reason: str) -> None:
    tier = make_tier("disk", device=torch.device("cpu"))
    with pytest.raises(ValueError, match=reason):
        tier.put(flat)
    tier.close()


def test_a_tier_that_is_of_no_use_is_refused(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="host memory already"):
        make_tier("host", device=cpu)
    with pytest.raises(ValueError, match="no tier 'tape'"):
        make_tier("tape", device=cpu)
    with pytest.raises(ValueError, match="makes no file"):
        make_tier("host", device=torch.device("cuda"), folder=tmp_path)
    with pytest.raises(ValueError, match="max_in_flight_bytes is 0"):
        make_tier("disk", device=cpu, max_in_flight_bytes=0)
    with pytest.raises(ValueError, match=r"late is 'never'; it is \"wait\", \"keep\" or, for a disk, \"steady\""):
        DiskTier(device=cpu, late="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_bytes is 5, but nothing is kept"):
        DiskTier(device=cpu, keep_bytes=5)
    with pytest.raises(OffloadError, match=f"{tmp_path}/none failed .No such file"):
        make_tier("disk", device=cpu, folder=tmp_path / "none")
