"""Under torch.compile gradients stay right, and what does not work there is said once by name."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight.activations.compiled import compiled_modules
from packlight.activations.engine import Engine
from packlight.activations.recompute import recompute
from tests.activations.cases import DISK, assert_equal, engine, everywhere, numbers

# torch 2.13's dynamo hides this warning of its own from being shown, not from being raised
pytestmark = [
    pytest.mark.usefixtures("seed", "fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out


class Chain(nn.Module):
    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def whole(model: Chain, **options: Any) -> nn.Module:
    return torch.compile(model, **({"backend": "aot_eager"} | options))  # type: ignore[return-value]


def one_block(model: Chain, **options: Any) -> nn.Module:
    model.blocks[1].compile(**({"backend": "aot_eager"} | options))
    return model


Compile = Callable[..., nn.Module]
Handle = Callable[[nn.Module], Any]


def assert_alike(
    handle: Handle, compiled: Compile, *, told: str | None = None, ran_before: bool = False, **options: Any
) -> None:
    """Compare two steps of a compiled model with and without a handle, and what was said."""
    model, x = Chain(), torch.randn(12, 16)
    for _ in range(2):
        model(x).square().mean().backward()
    expected = numbers(model)
    model.zero_grad()
    called = compiled(model, **options)
    if ran_before:
        called(x)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with handle(model):
            for _ in range(2):
                called(x).square().mean().backward()
    assert_equal(numbers(model), expected)
    messages = [str(each.message) for each in said if each.category is UserWarning]
    assert told is None or (len(messages) == bool(told) and all(told in each for each in messages))


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("compiled", [whole, one_block])
@pytest.mark.parametrize("how", ["keep", "compress", "offload"])
def test_the_engine_is_exact_and_says_once_what_a_graph_hides(how: str, compiled: Compile, ran_before: bool) -> None:
    named = "the Chain" if compiled is whole else "'blocks.1'"
    told = "" if how == "keep" else f"under torch.compile ({named}), what a graph saves"
    assert_alike(lambda model: engine(model, how), compiled, told=told, ran_before=ran_before)


@pytest.mark.parametrize("compiled", [whole, one_block])
def test_recomputed_blocks_in_which_sites_have_choices_are_exact(compiled: Compile) -> None:
    assert_alike(lambda model: engine(model, DISK[1]), compiled)


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("compiled", [whole, one_block])
def test_recompute_is_exact_and_says_that_its_blocks_run_uncompiled(compiled: Compile, ran_before: bool) -> None:
    assert_alike(recompute, compiled, told="recomputed blocks run uncompiled", ran_before=ran_before)


def test_parts_of_a_recomputed_block_may_be_compiled_without_a_word() -> None:
    def inner(model: Chain) -> nn.Module:
        for block in model.blocks:
            block.up.compile(backend="aot_eager")  # type: ignore[union-attr]
        return model

    assert_alike(recompute, inner, told="")


@pytest.mark.parametrize("how", ["compress", "offload"])
def test_the_engine_leaves_a_full_graph_whole(how: str) -> None:
    assert_alike(lambda model: everywhere(model, how, codec="mask"), whole, told="at its boundary", fullgraph=True)


def test_a_full_graph_with_recomputed_blocks_fails_by_the_package_s_name() -> None:
    model = Chain()
    with recompute(model), pytest.raises(Exception, match="packlight stands around this forward"):
        whole(model, fullgraph=True)(torch.randn(4, 16))


@pytest.mark.filterwarnings("ignore:under torch.compile:UserWarning")
def test_inductor_s_graphs_are_exact_at_their_boundary() -> None:
    model, x = Chain(num_blocks=1), torch.randn(12, 16)
    called = whole(model, backend="inductor")
    called(x).sum().backward()
    expected = numbers(model)
    model.zero_grad()
    with everywhere(model, "offload") as handle:
        called(x).sum().backward()
        assert handle.tier is not None and handle.tier.traffic().most_stored_bytes > 0
    assert_equal(numbers(model), expected)


def test_dynamo_does_not_trace_the_hooks() -> None:
    model = one_block(Chain())
    with pytest.warns(UserWarning, match="at its boundary") as said, everywhere(model, "compress"):
        model(torch.randn(12, 16)).sum().backward()
    assert not [each for each in said if "Dynamo" in str(each.message)]


def test_compiled_modules_are_named_with_those_around_a_block() -> None:
    model = Chain()
    assert compiled_modules(model) == []
    one_block(model)
    assert compiled_modules(model) == compiled_modules(model, around=["blocks.1.up"]) == ["'blocks.1'"]
    assert compiled_modules(model, around=["blocks.0", "blocks.10"]) == []
    assert compiled_modules(whole(model), around=["_orig_mod.blocks.0"]) == ["the Chain"]


def test_an_engine_that_keeps_all_says_nothing_of_compiled_modules() -> None:
    with Engine(one_block(Chain()), {"*": "keep"}):
        pass
