"""A block's second run gets the arguments and the attributes of the first, or an error says what changed."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packlight.activations.arguments import Arguments
from packlight.activations.recompute import recompute
from tests.activations.cases import assert_equal, numbers

pytestmark = pytest.mark.usefixtures("seed")


@dataclasses.dataclass
class Plain:
    x: Tensor
    seen: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    seen: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Slots:
    x: Tensor
    seen: list[Tensor] = dataclasses.field(default_factory=list)


class Cache:
    """What no rule knows how to rebuild."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.layers = x, [{"keys": x * 2}]


KINDS = [Plain, Frozen, Slots]


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, given: Any) -> Tensor:
        out: Tensor = self.linear(given.x).tanh() * given.x
        if hasattr(given, "seen"):
            given.seen.append(out)
        return out


class Chain(nn.Module):
    """Gives each block an object, and changes it between blocks."""

    def __init__(self, kind: Callable[[Tensor], Any], change: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList([Reads(), Reads()])
        self.kind, self.change = kind, change

    def forward(self, x: Tensor) -> Tensor:
        given = self.kind(self.first(x) * 1)
        y = self.blocks[0](given)
        given = self.change(given, y)
        out: Tensor = self.blocks[1](given) + y
        for each in getattr(given, "seen", []):
            out = out + each
        return out


def replace(given: Any, y: Tensor) -> Any:
    object.__setattr__(given, "x", y)
    return given


def leave(given: Any, y: Tensor) -> Any:
    return given


def write(given: Any, y: Tensor) -> Any:
    given.x.detach().add_(1)
    return given


def write_deep(given: Any, y: Tensor) -> Any:
    given.layers[0]["keys"].detach().add_(1)
    return given


def extend(given: Any, y: Tensor) -> Any:
    given.layers.append({"keys": y})
    return given


@pytest.mark.parametrize("change", [replace, leave])
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_instance_of_a_dataclass_holds_later_does_not_matter(kind: Any, change: Any) -> None:
    kept = Chain(kind, change)
    again = copy.deepcopy(kept)
    x = torch.randn(4, 8)
    kept(x).square().sum().backward()
    with recompute(again):
        again(x).square().sum().backward()
    assert_equal(numbers(again), numbers(kept))


@pytest.mark.parametrize("kind", [*KINDS, Cache])
def test_a_tensor_within_that_is_overwritten_after_the_block_is_an_error(kind: Any) -> None:
    model = Chain(kind, write)
    with recompute(model), pytest.raises(RuntimeError, match=r"modified by an inplace|argument of type Cache"):
        model(torch.randn(4, 8)).square().sum().backward()


@pytest.mark.parametrize("change", [replace, write_deep, extend])
def test_another_object_whose_tensors_change_is_an_error_by_its_type(change: Any) -> None:
    model = Chain(Cache, change)
    with recompute(model), pytest.raises(RuntimeError, match=r"an argument of type Cache .*keep that block"):
        model(torch.randn(4, 8)).square().sum().backward()


def test_another_object_that_stays_as_it_was_is_passed_on() -> None:
    kept = Chain(Cache, leave)
    again = copy.deepcopy(kept)
    x = torch.randn(4, 8)
    kept(x).sum().backward()
    with recompute(again):
        again(x).sum().backward()
    assert_equal(numbers(again), numbers(kept))


def test_arguments_are_rebuilt_with_what_is_shared_and_without_what_they_held() -> None:
    x, config = torch.ones(1), object()
    shared = Plain(x, [x + 1])
    arguments = Arguments((shared, [shared, config]), {"more": (Frozen(x), None, 2)})
    shared.x, shared.seen[0] = x + 7, x + 7
    args, kwargs = arguments.rebuilt(tuple(arguments.leaves))
    assert args[0] is args[1][0] and args[0] is not shared and type(args[0]) is Plain
    assert args[0].x is x and torch.equal(args[0].seen[0], x + 1) and args[1][1] is config
    assert type(kwargs["more"][0]) is Frozen and kwargs["more"][0].x is x and kwargs["more"][1:] == (None, 2)


# Attributes of the modules


class Stateful(nn.Module):
    """Keeps a tensor of the last call in a plain attribute, and computes with it."""

    def __init__(self, *, detached: bool = True, in_place: bool = False) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)
        self.state: Tensor | None = None
        self.detached, self.in_place = detached, in_place

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.linear(x)) * (1.0 if self.state is None else self.state)
        if self.state is not None and self.in_place:
            self.state.mul_(0.5)
        else:
            self.state = y.detach() * 0.5 if self.detached else y
        return y * y


def stateful(**options: bool) -> tuple[nn.Sequential, nn.Sequential]:
    kept = nn.Sequential(*[Stateful(**options) for _ in range(2)], nn.Sequential(nn.Linear(8, 8)))
    return kept, copy.deepcopy(kept)


def blocks_of(model: nn.Sequential) -> list[Stateful]:
    return [block for block in model if isinstance(block, Stateful)]


def test_tensors_in_plain_attributes_are_those_of_the_first_run_and_change_once() -> None:
    kept, again = stateful()
    x = torch.randn(4, 8)
    left = []
    for model in (kept, again):
        handle = recompute(model) if model is again else None
        torch.manual_seed(0)
        for _ in range(3):
            model(x)
            model(x).sum().backward()
        left.append([*numbers(model), *[block.state for block in blocks_of(model) if block.state is not None]])
        if handle is not None:
            handle.remove()
    assert_equal(*left)


def test_an_attribute_that_holds_a_graph_is_no_chain_of_all_earlier_steps() -> None:
    (model, _), x = stateful(detached=False), torch.randn(4, 8)
    with recompute(model):
        before = None
        for _ in range(3):
            for block in blocks_of(model):
                block.state = None if block.state is None else block.state.detach()
            loss = model(x).sum()
            loss.backward()
            nodes = _num_nodes(loss)
            assert before is None or nodes <= before + 8
            before = nodes


def _num_nodes(loss: Tensor) -> int:
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [each for each, _ in node.next_functions]
    return len(seen)


def test_an_attribute_that_is_written_in_place_is_an_error_that_names_it() -> None:
    _, model = stateful(in_place=True)
    x = torch.randn(4, 8)
    with recompute(model):
        model(x).sum().backward()
        with pytest.raises(RuntimeError, match=r"attribute 'state' of a Stateful .*keep the block"):
            model(x).sum().backward()


def test_evaluation_that_begins_before_backward_does_not_change_the_second_run() -> None:
    kept, again = stateful()
    x = torch.randn(4, 8)
    left = []
    for model in (kept, again):
        torch.manual_seed(0)
        handle = recompute(model) if model is again else None
        loss = model(x).sum()
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
        left.append(numbers(model))
        if handle is not None:
            handle.remove()
    assert_equal(*left)
