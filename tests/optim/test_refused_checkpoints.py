"""Damaged and foreign checkpoints: loading says what is wrong, and changes nothing."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from packlight.checkpoints.tree import difference
from packlight.optim import SGD, AdamW

State = dict[str, Any]

KINDS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params, state_format: AdamW(params, lr=1e-2, state_format=state_format),
    "SGD": lambda params, state_format: SGD(params, lr=1e-2, momentum=0.9, state_format=state_format),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128), nn.Linear(128, 4))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [{"params": named[:4]}, {"params": named[4:], "weight_decay": 0.0}]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num: int, *, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def saved(kind: str, state_format: str) -> dict[str, Any]:
    """A state dict that shares no tensors with an optimiser."""
    model = net()
    if state_format == "torch":
        groups = groups_of(model)
        optimizer: Any = torch.optim.AdamW(groups) if kind == "AdamW" else torch.optim.SGD(groups, momentum=0.9)
    else:
        optimizer = KINDS[kind](groups_of(model), state_format)
    steps(model, optimizer, 2, seed=2)
    return copy.deepcopy(optimizer.state_dict())


def first(key: str, number: float) -> Callable[[dict[str, Any]], None]:
    """Put a number into the first place of the first state's tensor of that name."""

    def put(state_dict: dict[str, Any]) -> None:
        state_dict["state"][0][key].view(-1)[0] = number

    return put


def numbers(key: str, *values: float) -> list[tuple[str, Callable[[dict[str, Any]], None]]]:
    return [(f"{key}={value}", first(key, value)) for value in values]


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda state_dict: state_dict["state"][0].pop(key)


def shorter(key: str) -> Callable[[dict[str, Any]], None]:
    def cut(state_dict: dict[str, Any]) -> None:
        state_dict["state"][0][key] = state_dict["state"][0][key][:-1].clone()

    return cut


def other_formats(name: str) -> Callable[[dict[str, Any]], None]:
    def rename(state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["state_formats"] = [name] * 4

    return rename


def option(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state_dict: state_dict["param_groups"][1].update({key: value})


def permuted(state_dict: dict[str, Any]) -> None:
    """Two matrices of the same number of elements, whose codes and scales would fit each other."""
    names = state_dict["param_groups"][0]["param_names"]
    names[0], names[2] = names[2], names[0]


def fewer_groups(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"].pop()


def fewer_parameters(state_dict: dict[str, Any]) -> None:
    state_dict["param_groups"][0]["params"].pop()


def stranger(state_dict: dict[str, Any]) -> None:
    state_dict["state"][17] = dict(state_dict["state"][0])


NAN, INF = math.nan, math.inf
LISTS: dict[tuple[str, str], list[tuple[str, Callable[[dict[str, Any]], Any]]]] = {
    ("AdamW", "4bit"): [
        *numbers("exp_avg_scale", NAN, INF, -1.0),
        *numbers("exp_avg_sq_scale", NAN, INF, -1.0),
        *numbers("exp_avg_sq_rows", NAN, -1.0),
        *numbers("step", NAN, -1.0),
        *((f"no {key}", without(key)) for key in ("step", "exp_avg_codes", "exp_avg_sq_scale", "exp_avg_sq_cols")),
        *((f"short {key}", shorter(key)) for key in ("exp_avg_codes", "exp_avg_scale")),
        *((f"as {name}", other_formats(name)) for name in ("8bit", "fp8", "fp32", "paper4bit", "5bit")),
        ("permuted names", permuted),
        ("fewer groups", fewer_groups),
        ("fewer parameters", fewer_parameters),
        ("a stranger's state", stranger),
        *((f"{key}={value}", option(key, value)) for key, value in (("lr", NAN), ("lr", -1.0), ("betas", (0.9, 2.0)))),
    ],
    ("AdamW", "fp8"): [*numbers("exp_avg_codes", 127, 255), *numbers("exp_avg_sq_codes", 127)],
    ("AdamW", "8bit"): [
        *numbers("exp_avg_scale", NAN),
        *numbers("exp_avg_sq_scale", INF),
        ("short", shorter("exp_avg_codes")),
    ],
    ("AdamW", "fp32"): [
        *numbers("exp_avg", NAN, INF),
        *numbers("exp_avg_sq", NAN, -1.0),
        ("short", shorter("exp_avg")),
    ],
    ("AdamW", "torch"): [
        *numbers("exp_avg", NAN, INF),
        *numbers("exp_avg_sq", NAN, -1.0),
        ("short", shorter("exp_avg")),
        ("no moment", without("exp_avg_sq")),
        ("permuted names", permuted),
        ("fewer groups", fewer_groups),
    ],
    ("SGD", "4bit"): [
        *numbers("momentum_buffer_scale", NAN, INF, -1.0),
        ("no codes", without("momentum_buffer_codes")),
        ("short", shorter("momentum_buffer_codes")),
        ("as 8bit", other_formats("8bit")),
        ("momentum=-1", option("momentum", -1.0)),
    ],
    ("SGD", "torch"): [*numbers("momentum_buffer", NAN), ("short", shorter("momentum_buffer"))],
}
CASES = [
    pytest.param(kind, state_format, damage, id=f"{kind}-{state_format}-{name}")
    for (kind, state_format), damages in LISTS.items()
    for name, damage in damages
]


@pytest.mark.parametrize(("kind", "state_format", "damage"), CASES)
def test_a_damaged_state_dict_is_refused_with_everything_as_it_was(
    kind: str, state_format: str, damage: Callable[[dict[str, Any]], Any]
) -> None:
    own = "4bit" if state_format == "torch" else state_format
    model, twin = net(), net()
    optimizer, other = (KINDS[kind](groups_of(each), own) for each in (model, twin))
    for each, one in ((model, optimizer), (twin, other)):
        steps(each, one, 1)
    state_dict = saved(kind, state_format)
    damage(state_dict)
    came = copy.deepcopy(state_dict)
    with pytest.raises(ValueError, match=r".{30}"):
        optimizer.load_state_dict(state_dict)
    assert difference(state_dict, came) is None
    assert difference(optimizer.state_dict(), other.state_dict()) is None
    for each, one in ((model, optimizer), (twin, other)):
        steps(each, one, 1, seed=3)
    assert difference(dict(model.named_parameters()), dict(twin.named_parameters())) is None


@pytest.mark.parametrize("state_format", ["4bit", "8bit", "fp8", "fp32", "torch"])
def test_what_is_not_damaged_is_loaded(state_format: str) -> None:
    model = net()
    optimizer = KINDS["AdamW"](groups_of(model), "4bit" if state_format == "torch" else state_format)
    state_dict = saved("AdamW", state_format)
    for group in state_dict["param_groups"]:
        group["param_names"] = [f"module.{name}" for name in group["param_names"]]  # as DistributedDataParallel's
    optimizer.load_state_dict(state_dict)
    steps(model, optimizer, 1)
    assert all(float(state["step"]) == 3 for state in optimizer.state.values())


def test_a_file_that_was_cut_off_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(saved("AdamW", "4bit"), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-3000])
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "cut.pt", weights_only=True)
