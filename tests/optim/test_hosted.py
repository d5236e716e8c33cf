"""States in host memory: the bits that they have on the device, bytes as they are counted, and nothing is left behind.

On a CPU host and device are one, but parameters and gradients pass through the same slots.
"""

import copy
import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight.activations.copies import HostCopy
from packlight.activations.pages import PAGE_BYTES, Pages
from packlight.optim import AdamW, adopt
from packlight.optim.adopted_state import own_state
from packlight.optim.early import update_early
from packlight.optim.hosted import NUM_SLOTS, ON_HOST, placed, staging_bytes
from packlight.optim.state import state_bytes
from packlight.planner.carry import Adopted

FORMATS = ("fp32", "8bit", "4bit")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("seed")


class Net(nn.Module):
    """More large parameters than slots, one of them in another order of memory, and small ones beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Conv2d(16, 40, 3)
        self.picture.weight.data = self.picture.weight.data.to(memory_format=torch.channels_last)
        self.layers = nn.Sequential(nn.Linear(40, 160), nn.GELU(), nn.Linear(160, 120), nn.GELU(), nn.Linear(120, 50))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(self.picture(inputs).mean((2, 3)))
        return outputs


def batches(dtype: torch.dtype = torch.float32, num: int = 4) -> list[Tensor]:
    return [torch.randn(8, 16, 5, 5).to(dtype) for _ in range(num)]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> list[float]:
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = net(batch).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def large(net: nn.Module) -> list[nn.Parameter]:
    return [param for param in net.parameters() if param.numel() > 4096]


def formats(net: nn.Module, name: str) -> dict[Tensor, str]:
    return dict.fromkeys(large(net), name)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def adamw(net: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-4, foreach=False)  # 1e-8 is nothing in fp16


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Pages]]:
    """The host memory that is taken, in order."""
    made: list[Pages] = []
    init = Pages.__init__

    def noted(self: Pages, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Pages, "__init__", noted)
    yield made
    made.clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["8bit", "4bit"])
def test_a_step_on_the_host_gives_the_bits_of_one_on_the_device(name: str, dtype: torch.dtype) -> None:
    here, there, data = Net().to(dtype), Net().to(dtype), batches(dtype)
    there.load_state_dict(here.state_dict())
    assert len(large(here)) > NUM_SLOTS
    own, hosted = adamw(here), adamw(there)
    adopt(own, formats(here, name))
    adopt(hosted, formats(there, name + ON_HOST))
    assert train(here, own, data) == train(there, hosted, data)
    assert same(here, there)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert all(torch.equal(own.state[a][key], hosted.state[b][key]) for key in own.state[a])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_in_fp32_on_the_host_are_stepped_by_packlights_kernel(dtype: torch.dtype) -> None:
    here, there, data = Net().to(dtype), Net().to(dtype), batches(dtype)
    there.load_state_dict(here.state_dict())
    own = AdamW(here.parameters(), lr=1e-2, eps=1e-4, state_format="fp32", bf16_rounding="nearest")
    hosted = adamw(there)
    adopt(hosted, formats(there, "fp32" + ON_HOST))
    for batch in data:  # the same gradients for both: torch steps the small ones with other roundings
        train(there, hosted, [batch])
        for a, b in zip(here.parameters(), there.parameters(), strict=True):
            a.grad = None if b.grad is None else b.grad.clone()
        own.step()
    assert all(torch.equal(a, b) for a, b in zip(large(here), large(there), strict=True))
    assert {hosted.state[param]["exp_avg"].dtype for param in large(there)} == {torch.float32}


@pytest.mark.parametrize("name", FORMATS)
def test_updates_inside_backward_give_the_same_bits(name: str) -> None:
    first, second, data = Net(), Net(), batches()
    second.load_state_dict(first.state_dict())
    late, early = adamw(first), adamw(second)
    adopt(late, formats(first, name + ON_HOST))
    with update_early(early, adopt(early, formats(second, name + ON_HOST))):
        assert train(first, late, data) == train(second, early, data)
    assert same(first, second)


@pytest.mark.parametrize("name", FORMATS)
def test_host_memory_is_counted_to_the_byte_and_given_back(name: str, pages: list[Pages]) -> None:
    net = Net()
    optimizer = adamw(net)
    with adopt(optimizer, formats(net, name + ON_HOST)) as handle:
        assert handle.host_bytes() == 0 and not pages
        train(net, optimizer, batches(num=2))
        states = sum(state_bytes(param.shape, param.dtype, name) for param in large(net))
        assert handle.host_bytes() == states + staging_bytes(large(net))
        assert sum(each.num_bytes for each in pages) == staging_bytes(large(net))
        assert len(pages) == NUM_SLOTS
    assert handle.host_bytes() == 0
    assert all(each.tensor.numel() == 0 for each in pages)


def test_a_slot_holds_the_largest_parameter_and_its_gradient_in_whole_pages() -> None:
    params = [torch.empty(1000), torch.empty(3, dtype=torch.bfloat16)]
    assert staging_bytes(params) == 2 * 2 * PAGE_BYTES
    assert staging_bytes(params[:1]) == 2 * PAGE_BYTES
    assert staging_bytes([]) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_unscales_and_skips_infinities(fused: bool) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), fused=fused)
    adopt(optimizer, formats(net, "4bit" + ON_HOST))
    plain = copy.deepcopy(net)
    own = torch.optim.AdamW(plain.parameters(), fused=fused)
    adopt(own, formats(plain, "4bit"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, batch in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(net(batch).square().mean()).backward()
        if step == 1:
            assert net.picture.weight.grad is not None
            net.picture.weight.grad[3, 3] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            train(plain, own, [batch])
    assert {float(optimizer.state[param]["step"]) for param in large(net)} == {3.0}
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_saved_loaded_copied_and_removed_states_are_torchs_own(name: str) -> None:
    net, data = Net(), batches(num=6)
    optimizer = adamw(net)
    train(net, optimizer, data[:2])  # states that exist move to the host
    handle = adopt(optimizer, formats(net, name + ON_HOST))
    train(net, optimizer, data[2:4])
    saved = copy.deepcopy(optimizer.state_dict())
    copied_net, copied = copy.deepcopy((net, optimizer))
    other = Net()
    other.load_state_dict(net.state_dict())
    resumed = adamw(other)
    resumed.load_state_dict(saved)
    handle.remove()
    for each in (optimizer, copied, resumed):
        states = each.state.values()
        assert {tuple(state) for state in states} == {("step", "exp_avg", "exp_avg_sq")}
        assert {type(state) for state in states} == {dict}
    losses = train(net, optimizer, data[4:])
    assert train(copied_net, copied, data[4:]) == train(other, resumed, data[4:]) == losses


def test_a_sparse_gradient_is_refused_and_nothing_has_changed() -> None:
    table = nn.Embedding(200, 64, sparse=True)
    optimizer = torch.optim.AdamW(table.parameters())
    adopt(optimizer, {table.weight: "4bit" + ON_HOST})
    before = table.weight.detach().clone()
    table(torch.tensor([3])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse=False"):
        optimizer.step()
    assert torch.equal(table.weight, before) and not optimizer.state.get(table.weight)


def test_unknown_formats_and_places_are_refused_by_name() -> None:
    net = Net()
    for name in ("5bit@host", "4bit@disk", "@host"):
        with pytest.raises(ValueError, match=repr(placed(name)[0])):
            adopt(adamw(net), formats(net, name))


class LateCopier:
    """Copies nothing before somebody waits for it, and then all that was begun up to there, in order."""

    def __init__(self) -> None:
        self.begun: list[tuple[Tensor, Tensor]] = []
        self.num_done = 0

    def copy(self, target: Tensor, source: Tensor) -> "LateCopy":
        self.begun.append((target, source))
        return LateCopy(self, len(self.begun))

    def wait(self) -> None:
        self.up_to(len(self.begun))

    def up_to(self, number: int) -> None:
        for target, source in self.begun[self.num_done : number]:
            target.copy_(source)
        self.num_done = max(self.num_done, number)


class LateCopy(HostCopy):
    def __init__(self, copier: LateCopier, number: int) -> None:
        super().__init__(0.0)
        self._copier, self._number = copier, number

    def wait(self) -> None:
        self._copier.up_to(self._number)

    order = settle = wait


@pytest.mark.parametrize("early", [False, True], ids=["in step", "in backward"])
def test_each_copy_is_waited_for_by_whoever_needs_it(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    copiers = list[LateCopier]()

    def late(_: torch.device) -> LateCopier:
        copiers.append(LateCopier())
        return copiers[-1]

    here, there, data = Net(), Net(), batches()
    there.load_state_dict(here.state_dict())
    own, hosted = adamw(here), adamw(there)
    adopt(own, formats(here, "4bit"))
    monkeypatch.setattr("packlight.optim.hosted.make_copier", late)
    handle = adopt(hosted, formats(there, "4bit" + ON_HOST))
    with update_early(hosted, handle) if early else nullcontext():
        assert train(here, own, data) == train(there, hosted, data)
    assert same(here, there)
    (copier,) = copiers
    assert copier.num_done == len(copier.begun) == 3 * len(large(there)) * len(data)


def test_states_that_the_device_has_no_room_for_stay_and_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = Net(), batches(num=6)
    twin = copy.deepcopy(net)
    optimizer, other = adamw(net), adamw(twin)
    handle, kept = adopt(optimizer, formats(net, "4bit" + ON_HOST)), adopt(other, formats(twin, "4bit" + ON_HOST))
    losses = train(twin, other, data)
    assert train(net, optimizer, data[:3]) == losses[:3]
    number = iter(range(9))

    def full(*args: Any) -> Any:
        if next(number) == 1:
            raise torch.OutOfMemoryError("no room")
        return own_state(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["packlight.optim.adopt"], "own_state", full)
        with pytest.raises(torch.OutOfMemoryError):
            handle.remove()
        released = Adopted(handle, handle.remove, is_beside=True)
        number = iter([1])
        with pytest.warns(UserWarning, match="stay where and as they are: no room"):
            released.release()
    assert train(net, optimizer, data[3:]) == losses[3:]
    handle.remove()
    kept.remove()
    assert type(optimizer.state[large(net)[0]]) is dict


def test_an_optimiser_that_goes_takes_its_slots_along(pages: list[Pages]) -> None:
    net = Net()
    optimizer = adamw(net)
    handle = adopt(optimizer, formats(net, "4bit" + ON_HOST))
    train(net, optimizer, batches(num=1))
    slots = [weakref.ref(each) for each in pages]
    pages.clear()
    del optimizer, handle
    gc.collect()
    assert len(slots) == NUM_SLOTS and [slot() for slot in slots] == [None, None]
