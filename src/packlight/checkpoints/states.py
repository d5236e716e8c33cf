"""An optimiser's states in a checkpoint, parameter by parameter: names, shapes, formats.

A state dict is keyed by numbers, and codes do not tell the shape of what they stand for. Names are in its groups where
the optimiser was built of named parameters, and the keys themselves where torch.distributed.checkpoint wrote it. A
model's state dict tells shapes, and names too where its order can be matched with the groups in one way only: see
`naming`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from packlight.checkpoints.refusal import CheckpointError, refused
from packlight.numerics import state_format
from packlight.optim import SGD, Adam, AdamW
from packlight.optim.checkpoint import Converter, saved_layout
from packlight.optim.foreign import NESTED_KEY
from packlight.optim.layout import Layout
from packlight.optim.state import MOMENTS, MOMENTUM

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """What a checkpoint tells of a parameter.

    Attributes:
        key: its key in the state dict, a number or a name.
        name: its name in the model; None where nothing tells it.
        shape: its whole shape; None where nothing tells it.
        state: its state; empty where it has not had a step.
        saved_format: the name of packlight's format; None for states of torch and others.
        group: which param group it is in.
    """

    key: Any
    name: str | None
    shape: Shape | None
    state: Mapping[str, Any]
    saved_format: str | None
    group: int

    def __str__(self) -> str:
        """Return how messages call it."""
        return f"parameter {self.name or self.key}"

    @property
    def known_shape(self) -> Shape:
        """Its shape, which is wanted.

        Raises:
            CheckpointError: nothing tells it.
        """
        if self.shape is None:
            raise CheckpointError(
                f"{self}: its state is codes, which do not tell its shape. Give the model's state dict: --model FILE."
            )
        return self.shape

    def layout(self) -> Layout:
        """Return how its state lies, of packlight's formats.

        Raises:
            CheckpointError: there is no such format, or nothing tells the shape.
        """
        assert self.saved_format is not None
        with refused(str(self)):
            return saved_layout(self.state, torch.empty(self.known_shape, device="meta"), self.saved_format)


@dataclass(frozen=True)
class States:
    """What a checkpoint tells of an optimiser.

    Attributes:
        kind: what it saves and loads, as the optimiser of packlight of that kind does.
        groups: its param groups.
        parameters: all of them, in the order of the groups.
    """

    kind: Converter
    groups: Sequence[Mapping[str, Any]]
    parameters: Sequence[Parameter]

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the moments."""
        return self.kind.moments

    def with_parameters(self, parameters: Sequence[Parameter]) -> "States":
        """Return the same with more known of the parameters."""
        return replace(self, parameters=tuple(parameters))


def states_of(optimizer: Mapping[str, Any]) -> States:
    """Return what an optimiser's state dict tells.

    Raises:
        CheckpointError: it is another optimiser's than AdamW, Adam or SGD, or has amsgrad; its groups do not agree
            with its states.
    """
    groups = optimizer["param_groups"]
    kind = _kind_of(groups)
    for number, group in enumerate(groups):
        with refused(f"param group {number}"):
            kind.read_group(group)
    parameters = [each for number, group in enumerate(groups) for each in _of_group(group, number, optimizer["state"])]
    keys = [each.key for each in parameters]
    if len(set(keys)) != len(keys):
        raise CheckpointError("a parameter is in several param groups; each was wanted in one")
    strangers = [key for key in optimizer["state"] if key not in set(keys)]
    if strangers:
        raise CheckpointError(
            f"there are states of {len(strangers)} parameters that no param group has, the first is {strangers[0]!r}"
        )
    return States(kind, groups, tuple(parameters))


def moment_shape(state: Mapping[str, Any]) -> Shape | None:
    """Return the shape of plain moments or bitsandbytes' codes, which is the parameter's; None where there are none."""
    lifted = {**state, **state.get(NESTED_KEY, {})}
    for name in (*MOMENTS, *MOMENTUM, "state1"):
        value = lifted.get(name)
        if isinstance(value, Tensor):
            return tuple(value.shape)
    return None


def has_moments(state: Mapping[str, Any]) -> bool:
    """Tell whether a state has more than a step count."""
    others = (value for key, value in state.items() if key not in ("step", "param_error"))
    return any(isinstance(value, Tensor | Mapping) for value in others)


def _kind_of(groups: Sequence[Mapping[str, Any]]) -> Converter:
    if not groups:
        raise CheckpointError("the optimiser has no param groups")
    first = groups[0]
    if "betas" in first:
        return AdamW.converter if first.get("decoupled_weight_decay", True) else Adam.converter
    if "momentum" in first:
        return SGD.converter
    raise CheckpointError(
        f"a param group with {sorted(map(str, first))} came, one of AdamW, Adam or SGD was wanted: other optimisers' "
        "states have no formats here"
    )


def _of_group(group: Mapping[str, Any], number: int, states: Mapping[Any, Any]) -> list[Parameter]:
    keys, names, formats = group["params"], group.get("param_names"), group.get("state_formats")
    for what, listed in (("param_names", names), ("state_formats", formats)):
        if listed is not None and len(listed) != len(keys):
            raise CheckpointError(
                f"param group {number} has {len(keys)} parameters and {len(listed)} {what}; as many were wanted"
            )
    for name in dict.fromkeys(formats or ()):
        with refused(f"param group {number}"):
            state_format(name)
    made = []
    for at, key in enumerate(keys):
        name = key if isinstance(key, str) else None if names is None else names[at]
        state = {} if states.get(key) is None else states[key]
        saved_format = None if formats is None else formats[at]
        made.append(Parameter(key, name, moment_shape(state), state, saved_format, number))
    return made


def is_of_other_library(state: Mapping[str, Any]) -> bool:
    """Tell whether a state is bitsandbytes' or torchao's."""
    return (
        NESTED_KEY in state
        or "state1" in state
        or any(isinstance(value, Tensor) and type(value).__module__.startswith("torchao") for value in state.values())
    )
