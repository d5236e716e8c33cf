"""Each device's tensors go to a tier of its own, and those that no tier serves stay, which is said once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from packlight.activations import alone
from packlight.activations.devices import TierByDevice, by_device
from packlight.activations.engine import Engine
from packlight.activations.offload import OffloadError, make_tier
from tests.activations.cases import CPU, MemoryTier, assert_equal, numbers

pytestmark = pytest.mark.usefixtures("seed")
META = torch.device("meta")


def make() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)])


def filled(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_a_model_that_gets_its_device_after_offload_was_asked_for_is_exact_and_moved() -> None:
    with META:
        model = make()
    x = torch.randn(8, 16)
    with alone.offload(model, tier="disk", min_bytes=0) as handle:
        filled(model)(x).square().sum().backward()
        assert handle.tier is not None
        handle.tier.flush()
        assert handle.tier.traffic().most_stored_bytes > 0
        moved = numbers(model)
    model.zero_grad()
    model(x).square().sum().backward()
    assert_equal(moved, numbers(model))


def test_tensors_of_another_device_than_the_tier_s_stay_which_is_said_once() -> None:
    model, x = make(), torch.randn(8, 16)
    model(x).square().sum().backward()
    expected = numbers(model)
    model.zero_grad()
    with (
        Engine(model, {"*": "offload"}, tier=make_tier("disk", device=META), min_bytes=0),
        pytest.warns(UserWarning, match=r"saved on cpu is not offloaded but kept: the tier is for meta") as said,
    ):
        model(x).square().sum().backward()
        assert_equal(numbers(model), expected)
        model(x)
    assert len(said) == 1


def test_a_tier_is_made_for_each_device_when_its_first_tensor_comes() -> None:
    made: list[torch.device] = []

    def tier_of(device: torch.device) -> MemoryTier:
        made.append(device)
        if device == META:
            raise ValueError("no tier for it")
        return MemoryTier()

    tier = TierByDevice("memory", tier_of)
    assert not made and tier.traffic().bytes_out == 0
    stored = tier.put(torch.arange(3))
    assert torch.equal(stored.get(), torch.arange(3)) and made == [CPU]
    with pytest.warns(UserWarning, match="saved on meta is not offloaded but kept: no tier for it"):
        assert not tier.takes(META)
    assert tier.takes(CPU) and not tier.takes(META) and made == [CPU, META]
    tier.flush()
    tier.close()
    with pytest.raises(OffloadError):
        tier.put(torch.arange(3))


@pytest.mark.parametrize("make_own", [MemoryTier, lambda: make_tier("disk", device=CPU)])
def test_a_given_tier_serves_its_own_device_or_all_if_it_names_none(make_own: Callable[[], MemoryTier]) -> None:
    tier = by_device(make_own())
    assert tier.takes(CPU) and by_device(tier) is tier
    tier.close()


def test_offload_keeps_what_finds_no_room_if_it_may_and_else_says_so(tmp_path: Path) -> None:
    model, x = make(), torch.randn(8, 16)
    model(x).square().sum().backward()
    expected = numbers(model)
    model.zero_grad()
    bounds = {"tier": "disk", "folder": tmp_path, "max_bytes": 4096, "min_bytes": 0}
    with (
        alone.offload(model, on_full="keep", **bounds),  # type: ignore[arg-type]
        pytest.warns(UserWarning, match="full|room"),
    ):
        model(x).square().sum().backward()
    assert_equal(numbers(model), expected)
    with alone.offload(model, **bounds), pytest.raises(OffloadError):  # type: ignore[arg-type]
        model(x).square().sum().backward()
