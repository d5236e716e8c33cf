"""Whose state is whose: parameters' names and shapes from a model's state dict.

Trainers sort parameters into groups (with weight decay, without), each in the model's order, and forget the names. So
the model's tensors are gone through in order, and each goes to the group whose next parameter it fits. Where it fits
several, or a tensor is left over that could have been meant, the names are not known, and that is said.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from packlight.checkpoints.refusal import CheckpointError, UnclearNames
from packlight.checkpoints.states import Parameter, States, has_moments
from packlight.numerics import moment_formats
from packlight.optim.state import moment_key

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "inv_freq")
"""Ends of names that are no parameters'."""

HINT = (
    "Give the model's state dict: --model FILE; or save an optimiser that is built of model.named_parameters(), whose "
    "checkpoints have names"
)


def named(states: States, model: Mapping[str, Tensor] | None) -> States:
    """Return states with all names and shapes that are to be known.

    Args:
        states: of the checkpoint.
        model: names and tensors; None: nothing is known beside the states.

    Raises:
        CheckpointError: names or shapes of the model are not those of the states.
        UnclearNames: the states have no names, and may be of several of the model's parameters.
    """
    parameters = states.parameters
    if model is None:
        return states
    if any(each.name is None for each in parameters):
        matched = dict(_matched(states, model))
        parameters = [replace(each, name=matched[each.key]) for each in parameters]
    missing = [each.name for each in parameters if each.name not in model]
    if missing:
        raise CheckpointError(
            f"the optimiser has a parameter {missing[0]!r} ({len(missing)} like it) that the model does not have; "
            f"it has {', '.join(list(model)[:3])}... Give the state dict of the model that was trained: --model FILE."
        )
    return states.with_parameters([_shaped(each, tuple(model[str(each.name)].shape), states) for each in parameters])


def _shaped(parameter: Parameter, shape: tuple[int, ...], states: States) -> Parameter:
    if not _fits(parameter, shape, states):
        came = f"moments of shape {parameter.shape}" if parameter.shape else "too many, too few or no codes and scales"
        raise CheckpointError(
            f"{parameter} has {came} in the optimiser (of {', '.join(map(str, parameter.state))}), and shape {shape} "
            "in the model. Give the model of this run."
        )
    return replace(parameter, shape=shape)


def _fits(parameter: Parameter, shape: tuple[int, ...], states: States) -> bool:
    """Tell whether a state can be of a parameter of that shape."""
    if parameter.shape is not None:
        return parameter.shape == shape
    if parameter.saved_format is None or not has_moments(parameter.state):
        return True
    layout = replace(parameter, shape=shape).layout()
    formats = moment_formats(layout.state_format, layout.shape)
    for name, moment_format in zip(states.moments, formats, strict=False):
        for suffix, (size, dtype) in moment_format.tensors(layout.shape).items():
            value = parameter.state.get(moment_key(name, suffix))
            if not isinstance(value, Tensor) or value.dtype != dtype or value.numel() != math.prod(size):
                return False
    return True


def _matched(states: States, model: Mapping[str, Tensor]) -> Iterator[tuple[object, str]]:
    """Yield keys and names, in the model's order."""
    waiting = [[each for each in states.parameters if each.group == number] for number in range(len(states.groups))]
    shapes, left = set(), []
    for name, tensor in _candidates(model):
        shape = tuple(tensor.shape)
        fitting = [group for group in waiting if group and _fits(group[0], shape, states)]
        if len(fitting) > 1:
            raise UnclearNames(
                f"the optimiser's parameters have no names, and {name!r} may be in {len(fitting)} of its param groups. "
                f"{HINT}."
            )
        if fitting:
            shapes.add(shape)
            yield fitting[0].pop(0).key, name
        else:
            left.append((name, shape))
    if any(waiting):
        raise UnclearNames(
            f"the optimiser's parameters have no names, and {sum(map(len, waiting))} of them are not found in the "
            f"model by their order and shapes. {HINT}."
        )
    unclear = [name for name, shape in left if shape in shapes]
    if unclear:
        raise UnclearNames(
            f"the optimiser's parameters have no names, and {unclear[0]!r} of the model has the shape of one of them "
            f"and may be it. {HINT}."
        )


def _candidates(model: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield what may be a parameter; a tensor that has several names, once."""
    seen = set[tuple[Any, ...]]()
    for name, tensor in model.items():
        if not tensor.is_floating_point() or name.endswith(BUFFERS):
            continue
        identity = tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)
        if identity not in seen:
            seen.add(identity)
            yield name, tensor
