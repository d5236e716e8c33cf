"""Updates inside backward give the same bits with the gradients of one parameter alive at a time."""

import copy
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packlight.optim import SGD, Adam, AdamW
from packlight.optim import release as releasing
from tests.cases import GPT, NUM_BYTES, windows

# Told once to users; the tests mean to go that way.
pytestmark = pytest.mark.filterwarnings("ignore:release_gradients=True updates parameters inside backward:UserWarning")

KINDS: dict[str, Callable[..., Any]] = {
    "AdamW": AdamW,
    "Adam": Adam,
    "SGD": lambda params, **options: SGD(params, momentum=0.9, **options),
}


def gpt(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    return GPT(width=64, num_layers=2, tied=tied).to(dtype)


def loss_of(net: nn.Module, step: int) -> Tensor:
    torch.manual_seed(step)
    tokens = windows(4, 32)
    return F.cross_entropy(net(tokens).float()[:, :-1].reshape(-1, NUM_BYTES), tokens[:, 1:].reshape(-1))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def same_states(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> bool:
    pairs = zip(left.state_dict()["state"].items(), right.state_dict()["state"].items(), strict=True)
    return all(
        index == other and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for (index, a), (other, b) in pairs
    )


def num_hooks(net: nn.Module) -> int:
    return sum(len(param._post_accumulate_grad_hooks or {}) for param in net.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_format", ["4bit", "8bit", "fp8", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_update_in_backward_is_the_ordinary_step_bit_for_bit(
    kind: str, state_format: str, dtype: torch.dtype, tied: bool
) -> None:
    net, plain = gpt(tied=tied, dtype=dtype), gpt(tied=tied, dtype=dtype)
    optimizer = KINDS[kind](net.named_parameters(), state_format=state_format, release_gradients=True)
    own = KINDS[kind](plain.named_parameters(), state_format=state_format)
    train(net, optimizer, steps=range(3))
    train(plain, own, steps=range(3))
    assert same(net, plain)
    assert optimizer.state_bytes() == own.state_bytes()
    states = (optimizer.state[a] for a in net.parameters()), (own.state[b] for b in plain.parameters())
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*states, strict=True) for key in a)


def test_gradients_are_gone_after_backward() -> None:
    net = gpt()
    optimizer = AdamW(net.parameters(), release_gradients=True)
    loss_of(net, 0).backward()
    assert all(param.grad is None for param in net.parameters())
    optimizer.step()
    assert all(param.grad is None for param in net.parameters())


def test_no_two_parameters_gradients_are_alive_at_once() -> None:
    net = gpt()
    params = list(net.parameters())
    alive: list[int] = []

    def record(_: Tensor) -> None:
        alive.append(sum(param.grad.nbytes for param in params if param.grad is not None))

    # Registered first, they run before the optimiser's.
    hooks = [param.register_post_accumulate_grad_hook(record) for param in params]
    optimizer = AdamW(params, release_gradients=True)
    for step in range(2):
        loss_of(net, step).backward()
        optimizer.step()
    assert len(alive) == 2 * len(params)
    assert sorted(alive) == sorted(2 * [param.nbytes for param in params])
    assert max(alive) < sum(param.nbytes for param in params) / 4
    for hook in hooks:
        hook.remove()  # torch does not show it to the garbage collector, and it holds the parameters


def test_second_backward_before_the_step_is_refused() -> None:
    net = gpt()
    AdamW(net.parameters()).step()
    optimizer = AdamW(net.parameters(), release_gradients=True)
    loss_of(net, 0).backward()
    before = copy.deepcopy(net)
    with pytest.raises(RuntimeError, match=r"accumulated.*have the first gradient's update; this one has been dropped"):
        loss_of(net, 1).backward()
    assert same(net, before)
    assert all(param.grad is None for param in net.parameters())
    optimizer.step()
    assert same(net, before)


def test_what_release_takes_away_is_said_once_when_the_optimiser_is_built() -> None:
    releasing._warn_once.cache_clear()
    net = gpt()
    with pytest.warns(UserWarning, match=r"clip_grad_norm_.*clip_coefficient.*GradScaler.*accumulation") as seen:
        optimizers = [AdamW(net.parameters(), release_gradients=True) for _ in range(2)]
    del optimizers[0]
    assert [Path(each.filename).name for each in seen] == [Path(__file__).name]
    loss_of(net, 0).backward()
    assert float(nn.utils.clip_grad_norm_(net.parameters(), 1.0)) == 0


def test_nothing_is_said_without_release() -> None:
    releasing._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW(gpt().parameters())


@pytest.mark.parametrize("coefficient", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_clip_coefficient_is_refused(coefficient: Tensor | float) -> None:
    net = gpt()
    optimizer = AdamW(net.parameters(), release_gradients=True)
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match=r"done already, by unclipped gradients: load.*without release_gradients"):
        optimizer.step(clip_coefficient=coefficient)


@pytest.mark.parametrize("freeze", [False, True], ids=["all released", "one gradient left"])
def test_grad_scaler_is_refused(freeze: bool) -> None:
    net = gpt()
    net.head.requires_grad_(not freeze)
    optimizer = AdamW(net.parameters(), release_gradients=True)
    net.head.requires_grad_(True)  # frozen when the optimiser was made: its gradient waits for step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, 0)).backward()
    with pytest.raises(RuntimeError, match=r"by scaled and unchecked gradients: load.*without release_gradients"):
        scaler.step(optimizer)


def test_parameter_that_was_frozen_is_updated_by_the_step() -> None:
    net, plain = gpt(), gpt()
    net.head.requires_grad_(False)
    optimizer, own = AdamW(net.parameters(), release_gradients=True), AdamW(plain.parameters())
    net.head.requires_grad_(True)
    train(net, optimizer, steps=range(3))
    train(plain, own, steps=range(3))
    assert same(net, plain)
    assert net.head.weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_loading_leaves_the_updates_in_backward(kind: str) -> None:
    net, plain = gpt(), gpt()
    optimizer, own = KINDS[kind](net.parameters(), release_gradients=True), KINDS[kind](plain.parameters())
    for model, one in ((net, optimizer), (plain, own)):
        train(model, one, steps=range(2))
        one.load_state_dict(one.state_dict())
        train(model, one, steps=range(2, 4))
    assert same(net, plain)
    loss_of(net, 4).backward()
    assert all(param.grad is None for param in net.parameters())
    with pytest.raises(RuntimeError, match="without release_gradients"):
        optimizer.step(clip_coefficient=0.5)


def test_added_group_is_released_too() -> None:
    net, plain = gpt(), gpt()
    pair = []
    for model, release in ((net, True), (plain, False)):
        optimizer = AdamW(model.token.parameters(), release_gradients=release)
        optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 1e-2})
        train(model, optimizer, steps=range(2))
        pair.append(optimizer)
    assert same(net, plain)
    assert net.head.weight.grad is None
    assert sorted(map(str, pair[0].state_dict()["state"])) == sorted(map(str, pair[1].state_dict()["state"]))


def test_no_hook_remains_when_the_optimiser_is_gone() -> None:
    net = gpt()
    optimizer = AdamW(net.parameters(), release_gradients=True)
    assert num_hooks(net) == len(list(net.parameters()))
    train(net, optimizer, steps=range(2))
    before = copy.deepcopy(net)
    del optimizer
    gc.collect()
    assert num_hooks(net) == 0
    loss_of(net, 0).backward()
    assert same(net, before)
    assert all(param.grad is not None for param in net.parameters())


def test_copy_steps_in_the_ordinary_way() -> None:
    net, plain = gpt(), gpt()
    optimizer, own = AdamW(net.parameters(), release_gradients=True), AdamW(plain.parameters())
    train(net, optimizer, steps=range(2))
    train(plain, own, steps=range(2))
    other_net, other = copy.deepcopy((net, optimizer))
    assert num_hooks(other_net) == 0
    train(other_net, other, steps=range(2, 4))
    train(plain, own, steps=range(2, 4))
    assert same(other_net, plain)
    assert not same(net, other_net)


def test_model_without_step_after_backward_has_been_updated_once() -> None:
    net, plain = gpt(), gpt()
    optimizer, own = AdamW(net.parameters(), release_gradients=True), AdamW(plain.parameters())
    train(plain, own, steps=range(1))
    loss_of(net, 0).backward()
    assert same(net, plain)
    optimizer.step()
    optimizer.step()
    assert same(net, plain)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_learning_rate_of_a_scheduler_is_that_of_the_next_backward() -> None:
    net, plain = gpt(), gpt()
    for model, release in ((net, True), (plain, False)):
        optimizer = AdamW(model.parameters(), lr=1e-2, release_gradients=release)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=5)
        for step in range(4):
            train(model, optimizer, steps=range(step, step + 1))
            scheduler.step()
    assert same(net, plain)


def test_sparse_gradient_is_refused_in_backward() -> None:
    embedding = nn.Embedding(100, 70, sparse=True)
    optimizer = AdamW(embedding.parameters(), release_gradients=True)
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match="sparse=False"):
        embedding(torch.tensor([1])).sum().backward()
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state
