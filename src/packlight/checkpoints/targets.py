"""What each target wants of an optimiser: how its states lie, and what its param groups say.

4bit 8bit fp8 fp32     packlight's format of that name, for the parameters that its policy gives it to
torch                  fp32 moments and numbered parameters, as torch.optim's optimisers save them
dcp                    by name, in rows that any number of processes cuts; the format stays
deepspeed-universal    fp32 moments of all parameters, beside fp32 weights
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from packlight.checkpoints.naming import HINT
from packlight.checkpoints.recode import Recoder, state_bytes, wanted_layout
from packlight.checkpoints.refusal import CheckpointError
from packlight.checkpoints.states import Parameter, States, is_of_other_library
from packlight.numerics.formats import MAX_FP32_ELEMENTS
from packlight.optim.layout import Layout
from packlight.optim.members import NUMBER
from packlight.optim.policy import EMBEDDING_FORMATS, format_of
from packlight.optim.state import MOMENTS, step_tensor

FORMATS = ("4bit", "8bit", "fp8", "fp32")
TORCH, DCP, UNIVERSAL = "torch", "dcp", "deepspeed-universal"
TARGETS = (*FORMATS, TORCH, UNIVERSAL, DCP)

State = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What is asked for.

    Attributes:
        name: one of `TARGETS`.
        container: what is written: TORCH (a file), DCP or UNIVERSAL (folders).
    """

    name: str
    container: str

    @property
    def is_format(self) -> bool:
        """Whether states are to have one of packlight's formats."""
        return self.name in FORMATS

    def format_for(self, parameter: Parameter) -> str:
        """Return the format that a parameter's state gets, as an optimiser with that format decides.

        Raises:
            CheckpointError: that hangs on the parameter's name, and nothing tells it.
        """
        if parameter.shape is None and not parameter.state:
            return parameter.saved_format or self.name
        shape = parameter.known_shape
        chosen = format_of(self.name, name=parameter.name, shape=shape)
        if parameter.name is None and chosen in EMBEDDING_FORMATS and math.prod(shape) > MAX_FP32_ELEMENTS:
            raise CheckpointError(
                f"{parameter} of shape {shape} has no name, and under {self.name!r} embeddings get "
                f"{EMBEDDING_FORMATS[chosen]!r}, which are told by their names. {HINT}."
            )
        return chosen

    def layout_for(self, parameter: Parameter) -> Layout | None:
        """Return how a parameter's state is to lie; None: as torch's."""
        if self.is_format:
            return wanted_layout(parameter.known_shape, self.format_for(parameter), in_rows=self.container == DCP)
        if self.name == DCP and parameter.saved_format is not None:
            return wanted_layout(parameter.known_shape, parameter.saved_format, in_rows=True)
        return None

    def key_of(self, parameter: Parameter, number: int) -> Any:
        """Return a parameter's key: its number, or its name.

        Raises:
            CheckpointError: its name, and nothing tells it.
        """
        if self.container == TORCH:
            return number
        if parameter.name is None:
            raise CheckpointError(f"{parameter} has no name, and {self.name} has parameters by name. {HINT}.")
        return parameter.name

    def state_of(self, parameter: Parameter, recoder: Recoder, *, common_step: float) -> State:
        """Return a parameter's state; empty where it has none, and none is wanted.

        Args:
            parameter: it.
            recoder: what makes states.
            common_step: the step count of one that has had no gradient, where such have states.

        Raises:
            CheckpointError: the state cannot be read or represented.
        """
        if not parameter.state:
            if self.name not in (DCP, UNIVERSAL):
                return {}
            return recoder.zeros(parameter, self.layout_for(parameter), step=common_step)
        layout = self.layout_for(parameter)
        if layout is not None:
            return recoder.compact(parameter, layout)
        if self.name == DCP and not is_of_other_library(parameter.state):
            recoder.portable(parameter)
            return {key: step_tensor(value) if key == "step" else value for key, value in parameter.state.items()}
        recoder.leave_error_bits(parameter.state)
        made: State = recoder.portable(parameter)
        return made if recoder.kind.moments == MOMENTS else {key: made[key] for key in made if key != "step"}

    def bytes_of(self, parameter: Parameter, moments: Sequence[str]) -> int:
        """Return the bytes that a parameter's state will take; 0 where its shape is not known."""
        if parameter.shape is None:
            return 0
        weights = 4 * math.prod(parameter.shape) if self.name == UNIVERSAL else 0
        return weights + state_bytes(parameter, self.layout_for(parameter), moments)


def groups_for(target: Target, states: States) -> list[dict[str, Any]]:
    """Return the param groups that a target wants."""
    made = []
    numbers = iter(range(len(states.parameters)))
    for number in range(len(states.groups)):
        members = [each for each in states.parameters if each.group == number]
        keys = [target.key_of(each, next(numbers)) for each in members]
        names = [each.name for each in members]
        entries = _options(target, states, number) | {"params": keys}
        if all(names) and target.name != UNIVERSAL:
            entries["param_names"] = names
        if target.is_format:
            entries["state_formats"] = [target.format_for(each) for each in members]
        made.append(entries)
    return made


def _options(target: Target, states: States, number: int) -> dict[str, Any]:
    """Return a group's entries but those that list its parameters."""
    kind, group = states.kind, states.groups[number]
    listed = ("params", "param_names")
    plain = {key: value for key, value in group.items() if key not in listed}
    if target.is_format and "state_formats" not in group:
        own = {key: value for key, value in kind.read_group(group).items() if key not in listed}
        decay = {"decoupled_weight_decay": kind.torch_options["decoupled_weight_decay"]} if "betas" in own else {}
        return {**own, **decay, NUMBER: number, "seed": 0, "bf16_rounding": "stochastic"}
    if target.is_format:
        return plain
    if target.name == DCP:
        return {**kind.torch_options, **plain}
    return {key: value for key, value in kind.portable_group(plain).items() if key not in listed}


def optimizer_for(target: Target, states: States, recoder: Recoder, tell: Callable[[int, int], None]) -> dict[str, Any]:
    """Return the optimiser's state dict that a target wants.

    Args:
        target: what is asked for.
        states: what there is.
        recoder: what makes states.
        tell: called after each parameter with how many are done, and of how many.

    Raises:
        CheckpointError: a state cannot be read or represented.
    """
    groups, made, step = groups_for(target, states), {}, common_step(target, states)
    for number, parameter in enumerate(states.parameters):
        state = target.state_of(parameter, recoder, common_step=step)
        if state:
            made[target.key_of(parameter, number)] = state
        tell(number + 1, len(states.parameters))
    return {"state": made, "param_groups": groups}


def common_step(target: Target, states: States) -> float:
    """Return the step count of parameters that have had no gradient, where those have states.

    Raises:
        CheckpointError: DeepSpeed is to have one count for all, and they differ; or the optimiser is not Adam's kind.
    """
    if target.name != UNIVERSAL:
        return 0.0
    if states.moments != MOMENTS:
        raise CheckpointError(
            "an SGD came, AdamW or Adam was wanted: DeepSpeed's universal checkpoints have exp_avg and exp_avg_sq and "
            "nothing else. Use --to torch or --to dcp."
        )
    steps = sorted({float(each.state["step"]) for each in states.parameters if "step" in each.state})
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters have had from {steps[0]:.0f} to {steps[-1]:.0f} steps, and DeepSpeed has one number of steps "
            "for all; the bias correction of some would be wrong. Use --to torch or --to dcp."
        )
    return steps[0] if steps else 0.0
