"""A stand-in runs the module that is called, in copies too, refuses what it cannot do, and leaves no trace."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight.activations.engine import Engine
from packlight.activations.recompute import recompute
from packlight.activations.standin import stand_ins
from tests.activations.cases import assert_equal, engine, everywhere, numbers

pytestmark = pytest.mark.usefixtures("seed")

Handle = Callable[[nn.Module], Any]
HANDLES: dict[str, Handle] = {
    "recompute": recompute,
    "compress": lambda model: everywhere(model, "compress", codec="mask"),
    "both": lambda model: engine(model, "recompute, offload, keep and compress in each block"),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x).sigmoid() * self.scale
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.scale = nn.ModuleList(Block() for _ in range(3)), 1.0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


@pytest.mark.parametrize("handle", HANDLES.values(), ids=HANDLES)
def test_a_shallow_copy_runs_its_own_forward_and_not_the_original_s(handle: Handle) -> None:
    model, x = Model(), torch.randn(4, 8)
    expected = model(x)
    with handle(model):
        copied, block = copy.copy(model), copy.copy(model.blocks[0])
        copied.scale, block.scale = 2.0, 3.0  # type: ignore[assignment]
        assert torch.equal(copied(x), 2 * expected) and torch.equal(model(x), expected)
        assert torch.equal(block(x), 3 * model.blocks[0](x))
        copied(x).sum().backward()
        theirs = numbers(model)
    model.zero_grad()
    (2 * model(x)).sum().backward()
    assert_equal(theirs, numbers(model))


def replica_of(module: nn.Module) -> Any:
    """Do as DataParallel does, which needs GPUs."""
    return module._replicate_for_data_parallel()


@pytest.mark.parametrize("how", ["recompute", "compress"])
def test_a_replica_runs_on_its_own_weights(how: str) -> None:
    model, x = Model(), torch.randn(4, 8)
    with HANDLES[how](model):
        replica, blocks = replica_of(model), [replica_of(block) for block in model.blocks]
        replica.blocks = nn.ModuleList(blocks)
        expected = x
        for block in blocks:
            block.linear = nn.Linear(8, 8)
            expected = block.linear(expected).sigmoid()
        if how == "recompute":
            assert torch.equal(replica(x), expected)
        else:
            with pytest.warns(UserWarning, match="DataParallel runs replicas of the Model") as said:
                assert torch.equal(replica(x), expected) and torch.equal(replica(x), expected)
            assert len(said) == 1


# torch's forward-mode derivatives still make scripts, at their first use
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("handle", HANDLES.values(), ids=HANDLES)
def test_transforms_of_torch_func_that_differentiate_raise_a_clear_error(handle: Handle) -> None:
    model, x = Model(), torch.randn(4, 8)
    weights: dict[str, Tensor] = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (x,)).sum()  # type: ignore[no-any-return]

    transforms = [torch.func.grad(loss), torch.func.jacrev(loss), torch.func.hessian(loss)]
    with handle(model):
        for transform in transforms:
            with pytest.raises(RuntimeError, match=r"torch\.func that differentiates.*remove\(\)"):
                transform(weights)
        with pytest.raises(RuntimeError, match=r"torch\.func that differentiates"):
            torch.vmap(torch.func.grad(lambda one: model(one).sum()))(x)
    assert set(torch.func.grad(loss)(weights)) == set(weights)


@pytest.mark.parametrize("handle", HANDLES.values(), ids=HANDLES)
@pytest.mark.filterwarnings("ignore:torch's checkpoint does not know vmap:UserWarning")
def test_vmap_alone_is_bit_equal(handle: Handle) -> None:
    model, x = Model(), torch.randn(5, 4, 8)
    torch.vmap(model)(x).square().sum().backward()
    expected = numbers(model)
    model.zero_grad()
    with handle(model):
        torch.vmap(model)(x).square().sum().backward()
    assert_equal(numbers(model), expected)


def test_under_vmap_recompute_says_once_that_it_keeps() -> None:
    model = Model()
    with recompute(model), pytest.warns(UserWarning, match="under it 'blocks.0' is not recomputed") as said:
        for _ in range(2):
            torch.vmap(model)(torch.randn(5, 4, 8))
    assert len(said) == 1


@pytest.mark.parametrize("first_leaves_first", [False, True])
def test_a_block_s_stand_in_and_the_engine_s_on_one_module_leave_in_either_order(first_leaves_first: bool) -> None:
    model = nn.Sequential(*[each for _ in range(4) for each in (nn.Linear(8, 8), nn.ReLU())])
    handles: list[Any] = [recompute(model), Engine(model, {"*": "compress"}, min_bytes=0)]
    assert len(stand_ins(model)) == 2
    with pytest.raises(ValueError, match="recomputed already"):
        recompute(model)
    for handle in handles if first_leaves_first else handles[::-1]:
        handle.remove()
    assert stand_ins(model) == [] and "forward" not in model.__dict__


class Refuses(nn.Linear):
    """A module that takes no hooks."""

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("no hooks here")


def test_an_engine_that_cannot_be_made_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), Refuses(8, 8)))
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(TypeError, match="no hooks here"):
        Engine(model, {"0": "recompute", "*": "compress"})
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# torch deprecates its own scripts
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("handle", HANDLES.values(), ids=HANDLES)
def test_scripted_modules_inside_are_exact(handle: Handle) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    model, x = nn.Sequential(Block(), Block(), scripted), torch.randn(4, 8)
    for _ in range(4):  # it fuses operations after a few calls, which changes last bits
        model.zero_grad()
        model(x).square().sum().backward()
    expected = numbers(model)
    model.zero_grad()
    with handle(model):
        model(x).square().sum().backward()
    assert_equal(numbers(model), expected)
