"""States of an adopted optimiser: encoded when it is adopted or loads, torch's own when it is saved or given back."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight.optim import Adoption, adopt, can_adopt
from packlight.optim.state import nbytes

# What encoding may change, of the largest magnitude: half of NF4's widest gap, -1 to -.696; and half of 1/16 in the
# root, which is twice that in the square of numbers up to 1.
ENCODING_ERROR = {"exp_avg": 0.1520, "exp_avg_sq": 1 / 16, "step": 0.0}


class Model(nn.Module):
    """Two weights that are worth compressing, two biases that stay with torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(70, 80), nn.Linear(80, 70)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.first(inputs).tanh())
        return outputs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share among threads, and the cores are not ours alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loss_of(net: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(16, 70, generator=torch.Generator().manual_seed(step))
    loss: Tensor = net(inputs.to(next(net.parameters()).dtype)).float().square().mean()
    return loss


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()


def weights(net: Model) -> dict[Tensor, str]:
    return {net.first.weight: "4bit", net.last.weight: "4bit"}


def same(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_states_that_exist_are_encoded_and_remove_decodes_them() -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, steps=range(3))
    exact = {name: optimizer.state[net.first.weight][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    handle = adopt(optimizer, weights(net))
    assert "exp_avg" not in optimizer.state[net.first.weight]
    handle.remove()
    handle.remove()
    state = optimizer.state[net.first.weight]
    assert type(state) is dict
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(state["step"]) == 3
    for name, values in exact.items():
        assert float((state[name] - values).abs().max()) <= ENCODING_ERROR[name] * float(values.abs().max())
    gradient_hooks = list(optimizer._optimizer_step_pre_hooks) + list(optimizer._optimizer_step_post_hooks)
    assert gradient_hooks == []
    train(net, optimizer, steps=range(3, 5))
    assert float(optimizer.state[net.first.weight]["step"]) == 5
    assert can_adopt(optimizer) is None


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_saved_checkpoint_resumes_in_plain_torch(kind: type[torch.optim.Adam]) -> None:
    net, plain = Model(), Model()
    optimizer = kind(net.parameters(), lr=1e-2, foreach=False)
    handle = adopt(optimizer, weights(net))
    train(net, optimizer, steps=range(4))
    state_dict = through_file(optimizer.state_dict())
    handle.remove()
    resumed = kind(plain.parameters(), foreach=False)
    resumed.load_state_dict(state_dict)
    plain.load_state_dict(net.state_dict())
    train(net, optimizer, steps=range(4, 7))
    train(plain, resumed, steps=range(4, 7))
    assert same(net, plain)
    assert {tensor.dtype for state in state_dict["state"].values() for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_of_plain_torch_is_encoded_on_load(dtype: torch.dtype) -> None:
    net, plain = Model().to(dtype), Model().to(dtype)
    theirs, adopted = torch.optim.AdamW(plain.parameters(), lr=0.5), torch.optim.AdamW(net.parameters())
    train(plain, theirs, steps=range(3))
    handle = adopt(adopted, weights(net))
    adopted.load_state_dict(through_file(theirs.state_dict()))
    state = adopted.state[net.first.weight]
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert state["exp_avg_scale"].dtype == state["exp_avg_sq_scale"].dtype == torch.float32
    assert adopted.param_groups[0]["lr"] == 0.5
    assert handle.state_bytes() < 0.5 * sum(nbytes(one) for one in theirs.state.values())
    train(net, adopted, steps=range(3, 4))
    assert float(adopted.state[net.first.weight]["step"]) == 4


def test_state_dict_loads_back_into_an_adopted_optimiser() -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters())
    adopt(optimizer, weights(net))
    train(net, optimizer, steps=range(3))
    before = optimizer.state_dict()
    optimizer.load_state_dict(before)
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            bound = ENCODING_ERROR[key] * float(before["state"][index][key].abs().max())
            assert float((value - before["state"][index][key]).abs().max()) <= bound


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_copy_is_a_plain_optimiser_with_the_same_moments(clone: Callable[[Any], Any]) -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters(), foreach=False)
    handle = adopt(optimizer, weights(net))
    train(net, optimizer, steps=range(3))
    other_net, other = clone((net, optimizer))
    assert type(other.state[other_net.first.weight]) is dict
    handle.remove()
    train(net, optimizer, steps=range(3, 5))
    train(other_net, other, steps=range(3, 5))
    assert same(net, other_net)
    assert isinstance(adopt(other, weights(other_net)), Adoption)


def test_step_after_remove_with_fused_finds_its_step_where_torch_puts_it() -> None:
    net = Model()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    with adopt(optimizer, weights(net)):
        train(net, optimizer, steps=range(2))
    train(net, optimizer, steps=range(2, 3))
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
