"""What an optimiser's step costs: as it is, traced on fake tensors, and in the state formats that it could have.

torch makes an optimiser's states in its first step, so before that nothing tells their bytes. Here the optimiser's own
code steps twice on fake parameters: the first step makes the states, the second has only temporaries. For a format
that packlight brings along, the states' bytes are a formula (`optim/state.py`), and only the update of the largest
parameter is traced.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from packlight.numerics.formats import moment_formats
from packlight.optim.adopt import can_adopt
from packlight.optim.state import STEP_BYTES, group_settings, init_state, state_bytes, update
from packlight.planner.fake import FakeLine
from packlight.planner.timeline import flat_tensors
from packlight.step import OptimizerCost

MAX_TRACED_ELEMENTS = 2**22
"""A low-bit update is traced on a parameter of about this size at most."""


def optimizer_costs(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    fake_optimizers: Sequence[torch.optim.Optimizer],
    line: FakeLine,
) -> tuple[OptimizerCost, ...]:
    """Trace optimisers as they are, and cost the formats that their states could have.

    Args:
        model: the module that is trained.
        optimizers: its optimisers.
        fake_optimizers: their copies on fake tensors, with gradients.
        line: the line of events that is being written.

    Returns:
        The present format first; then the others, where packlight knows every optimiser.
    """
    names = {at: name for each in optimizers for at, name in parameter_names(model, each).items()}
    known = all(can_adopt(optimizer) is None for optimizer in optimizers)
    present = _traced(fake_optimizers, names, line, state_format="fp32" if known else "as is")
    settings_of = optimizers[0].param_groups[0]
    return (present, _low_bit("paper4bit", names, settings_of, line)) if known else (present,)


def _traced(
    fake_optimizers: Sequence[torch.optim.Optimizer],
    names: Mapping[torch.Tensor, str],
    line: FakeLine,
    *,
    state_format: str,
) -> OptimizerCost:
    """Let the optimisers step twice."""
    with torch.no_grad():
        for optimizer in fake_optimizers:
            optimizer.step()
        before_bytes, before_seconds = line.live_bytes, line.seconds
        line.highest_bytes()
        for optimizer in fake_optimizers:
            optimizer.step()
    return OptimizerCost(
        state_format=state_format,
        state_bytes=_held_bytes(fake_optimizers, line.device_type),
        temporary_bytes=line.highest_bytes() - before_bytes,
        seconds=line.seconds - before_seconds,
        formats=dict.fromkeys(names.values(), state_format),
    )


def _held_bytes(optimizers: Sequence[torch.optim.Optimizer], device_type: str) -> int:
    """Add up the states' storages on the device, each once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for optimizer in optimizers
        for tensor in flat_tensors(list(optimizer.state.values()))
        if tensor.device.type == device_type
    }
    return sum(storages.values())


def _low_bit(
    state_format: str, names: Mapping[torch.Tensor, str], settings_of: Mapping[str, object], line: FakeLine
) -> OptimizerCost:
    """Cost the optimiser with states in a low-bit format, without making them all."""
    shapes = {name: tuple(parameter.shape) for parameter, name in names.items()}
    step_bytes = 0 if line.device_type == "cpu" else STEP_BYTES  # the step counter stays on the CPU
    num_bytes = sum(state_bytes(at.shape, at.dtype, state_format) - step_bytes for at in names)
    return OptimizerCost(
        state_format=state_format,
        state_bytes=num_bytes,
        temporary_bytes=_update_bytes(state_format, max(names, key=torch.Tensor.numel), settings_of, line),
        seconds=sum(map(math.prod, shapes.values())) * line.rates.update_seconds_per_element,
        formats={
            name: "fp32" if moment_formats(state_format, shape)[0].book is None else state_format
            for name, shape in shapes.items()
        },
    )


def _update_bytes(state_format: str, parameter: torch.Tensor, settings_of: Mapping[str, object], line: FakeLine) -> int:
    """Return the most that the update of one parameter allocates beside its state.

    It works in chunks, so a parameter of fewer rows that still takes several shows as much.
    """
    inner = math.prod(parameter.shape[1:])
    num_rows = min(parameter.shape[0], max(1, MAX_TRACED_ELEMENTS // max(1, inner))) if parameter.dim() else 0
    shape = (num_rows, *parameter.shape[1:]) if parameter.dim() else ()
    with torch.no_grad():
        fake = torch.empty(shape, dtype=parameter.dtype, device=line.device_type)
        state, settings = init_state(fake, state_format), group_settings(settings_of)
        before_bytes = line.live_bytes
        line.highest_bytes()
        update(fake, fake, state, state_format=state_format, settings=settings)
    return line.highest_bytes() - before_bytes


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, str]:
    """Name an optimiser's parameters as the model names them; "parameter N" for those outside the model."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {parameter: names.get(parameter, f"parameter {at}") for at, parameter in enumerate(stepped)}
