"""A copied optimiser has what its class keeps beside param groups and states, and no function of the original."""

import copy
import threading
from typing import Any

import torch
from torch import nn

import packlight
from packlight.planner.likeness import attached, likeness


class Keeping(torch.optim.Optimizer):
    """As other libraries' are: what it needs for a step stands in attributes, one of them by a parameter's `id`."""

    def __init__(self, parameters: Any, owner: nn.Module) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.scale, self.owner, self.told = torch.ones(3), owner, self.tell
        self.lock = threading.Lock()  # which nothing can copy

    def tell(self) -> int:
        return id(self)

    def step(self, closure: Any = None) -> Any:
        for parameter in (each for group in self.param_groups for each in group["params"] if each.grad is not None):
            state = self.state[parameter]
            if not state:
                state["rows"] = torch.zeros(parameter.shape[0]) * self.scale.sum()
            parameter.sub_(parameter.grad)


def test_a_copy_has_the_attributes_of_its_class_and_knows_the_copied_model() -> None:
    model = nn.Linear(4, 2)
    optimizer = Keeping(model.parameters(), model)
    copied_model, (copied,) = likeness(model, [optimizer], {}, lambda tensor: tensor.clone())
    assert isinstance(copied, Keeping)
    assert copied.owner is copied_model is not model
    assert copied.scale is not optimizer.scale and torch.equal(copied.scale, optimizer.scale)
    assert copied.param_groups[0]["params"][0] is copied_model.weight
    assert "told" not in vars(copied) and "lock" not in vars(copied)


def test_states_of_an_optimiser_with_attributes_are_counted_before_its_first_step() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer, batch = Keeping(model.parameters(), model), torch.ones(8, 64)
    plan = packlight.plan(model, batch, optimizer, budget="1GiB", loss=lambda output, _: output.mean())
    assert not optimizer.state
    assert plan.estimate.peak_by_category["optimizer_states"] == 4 * 64 * 4
    assert not any("cannot be traced" in note for note in plan.notes)


class Scaled(nn.Parameter):
    """A parameter that copies itself by a rule of its own, with scales in a state that refers to another one."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a real tensor would be made")


class State:
    def __init__(self, scales: torch.Tensor, inner: "State | None" = None) -> None:
        self.scales, self.inner = scales, inner


def test_what_hangs_on_a_parameter_is_found_and_copied_with_it() -> None:
    model = nn.Linear(4, 2, bias=False)
    model.weight = Scaled(model.weight.detach(), requires_grad=False)
    inner = State(torch.ones(2))
    model.weight.state = State(torch.ones(5), inner)  # type: ignore[attr-defined]
    model.weight.owner = model  # type: ignore[attr-defined]
    copied, _ = likeness(model, [], {}, torch.clone)
    assert copied.weight.owner is copied  # type: ignore[union-attr]
    assert [tuple(each.shape) for each in attached(copied.parameters())] == [(5,), (2,)]
    assert copied.weight.state.inner is not inner  # type: ignore[union-attr]
    assert not copied.weight.requires_grad


def test_torchs_own_optimisers_are_copied_as_ever() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it puts a wrapper of `step` into the optimiser's attributes
    _, (copied,) = likeness(model, [optimizer], {}, torch.clone)
    assert set(vars(copied)) == set(vars(copy.deepcopy(optimizer)))
