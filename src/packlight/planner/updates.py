"""What an optimiser's step costs: as it is, traced on fake tensors, and in the state formats that it could have.

torch makes an optimiser's states in its first step, so before that nothing tells their bytes. Here the optimiser's own
code steps twice on fake parameters: the first step makes the states, the second has only temporaries. For a format
that packlight brings along, the states' bytes are a formula (`optim/state.py`), and only the update of the largest
parameter is traced.
"""

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from packlight.numerics.formats import moment_formats
from packlight.optim.adopt import can_adopt
from packlight.optim.adopted_state import CompactState
from packlight.optim.hosted import ON_HOST, staging_bytes
from packlight.optim.policy import format_of
from packlight.optim.state import STEP_BYTES, group_settings, init_state, state_bytes, step_device
from packlight.optim.stepping import update
from packlight.planner.fake import FakeLine
from packlight.planner.hardware import LOW_BITS
from packlight.planner.likeness import is_managed, keep_paged_apart, paged_notes, state_tensors
from packlight.planner.loop import parameters_of
from packlight.step import OptimizerCost

MAX_TRACED_ELEMENTS = 2**22
"""A low-bit update is traced on a parameter of about this size at most."""


def optimizer_costs(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    fake_optimizers: Sequence[torch.optim.Optimizer],
    line: FakeLine,
    *,
    on_host: bool,
) -> tuple[OptimizerCost, ...]:
    """Trace optimisers as they are, and cost the formats that their states could have.

    Args:
        model: the module that is trained.
        optimizers: its optimisers.
        fake_optimizers: their copies on fake tensors, with gradients.
        line: the line of events that is being written.
        on_host: whether states may lie in host memory.

    Returns:
        The present format first; then the others, where packlight knows every optimiser.
    """
    names = {at: name for each in optimizers for at, name in parameter_names(model, each).items()}
    # A parameter may be of two optimisers, as where one wraps the other; it has one copy.
    fakes = dict.fromkeys(fake for each in fake_optimizers for fake in parameters_of(each))
    stepped = {name: fake for name, fake in zip(names.values(), fakes, strict=True) if fake.grad is not None}
    real = {at for each in optimizers for at in each.state}
    held = {name: at.numel() for at, name in names.items() if name in stepped or at in real}
    known = all(can_adopt(optimizer) is None for optimizer in fake_optimizers)  # these have not been adopted
    state_format = "fp32" if known else "as is"
    _step(fake_optimizers, line)  # it makes the states
    temporary_bytes, seconds = _step(fake_optimizers, line)
    present = OptimizerCost(
        state_format=state_format,
        state_bytes=_held_bytes(fake_optimizers, line.device_type),
        temporary_bytes=temporary_bytes,
        seconds=seconds,
        formats=dict.fromkeys(held, state_format),
        num_elements=held,
        alone_share=_alone_share(fake_optimizers, line),
    )
    resting = _resting(optimizers, names, stepped)
    if not known:
        return (_beside(present, resting, line.device_type),)
    found, costs = [dict.fromkeys(stepped, "fp32")], [present]

    @functools.cache
    def rest_of(large: frozenset[str]) -> OptimizerCost:
        return _rest(large, stepped, fake_optimizers, line, present=present)

    in_fp32 = {name: "fp32" for name, at in _formats(LOW_BITS[0], model, stepped).items() if at != "fp32"}
    if on_host:
        costs += _on_host("fp32", in_fp32, stepped, line, rest=rest_of(frozenset(in_fp32)))
    for state_format in LOW_BITS:
        formats = _formats(state_format, model, stepped)
        if formats not in found:  # two of them may come to the same
            found.append(formats)
            large = {name: at for name, at in formats.items() if at != "fp32"}
            rest, settings = rest_of(frozenset(large)), fake_optimizers[0].param_groups[0]
            costs.append(_low_bit(state_format, large, stepped, line, rest=rest, settings_of=settings))
            if on_host:
                costs += _on_host(state_format, large, stepped, line, rest=rest)
    return tuple(_beside(cost, resting, line.device_type) for cost in costs)


def _resting(
    optimizers: Sequence[torch.optim.Optimizer], names: Mapping[torch.Tensor, str], stepped: Collection[str]
) -> dict[str, CompactState]:
    """Return compact states of parameters that get no gradient now; the copies on fake tensors lack them."""
    states = ((names.get(at, ""), state) for each in optimizers for at, state in each.state.items())
    return {name: state for name, state in states if isinstance(state, CompactState) and name and name not in stepped}


def _beside(cost: OptimizerCost, resting: Mapping[str, CompactState], device_type: str) -> OptimizerCost:
    """Add states that are held in their formats while their parameters rest."""
    tensors = (tensor for state in resting.values() for tensor in state.values())
    held_bytes = sum(tensor.nbytes for tensor in tensors if tensor.device.type == device_type)
    formats = {name: state.told_format() for name, state in resting.items()}
    return replace(cost, state_bytes=cost.state_bytes + held_bytes, formats={**cost.formats, **formats})


def step_as_on_cuda(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let optimisers step as torch's do by default on CUDA: a group at once, with temporaries as large as all of it.

    Source: `_default_to_fused_or_foreach` in torch/optim/optimizer.py, which asks for the parameters' device and type;
    fake parameters are of another.
    """
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        undecided = group.get("foreach", False) is None and not group.get("fused")
        if undecided and not group.get("differentiable") and not isinstance(group.get("lr"), torch.Tensor):
            group["foreach"] = True
    keep_paged_apart(optimizers)


def notes_on(fake_optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """Say which optimisers' states stay as they are, and why; and where paged ones are.

    Args:
        fake_optimizers: copies on fake tensors, which have stepped.

    Returns:
        A line for each.
    """
    reasons = ((type(each).__name__, can_adopt(each)) for each in fake_optimizers)
    stay = (f"the states of {kind} stay as they are: {reason}" for kind, reason in reasons if reason)
    return [*stay, *paged_notes(fake_optimizers)]


def _step(fake_optimizers: Sequence[torch.optim.Optimizer], line: FakeLine) -> tuple[int, float]:
    """Let the optimisers step; return the step's bytes above what lived before it, and its seconds."""
    before_bytes, before_seconds = line.live_bytes, line.seconds
    line.highest_bytes()
    with torch.no_grad():
        for optimizer in fake_optimizers:
            optimizer.step()
    return line.highest_bytes() - before_bytes, line.seconds - before_seconds


def _alone_share(fake_optimizers: Sequence[torch.optim.Optimizer], line: FakeLine) -> float:
    """Return what the step of a parameter alone allocates, for each byte of it: the most of any group's settings."""
    groups = [group["params"] for each in fake_optimizers for group in each.param_groups]
    stepped = [[at for at in group if at.grad is not None] for group in groups]
    everything, share = [at for group in stepped for at in group], 0.0
    for group in filter(None, stepped):
        largest = max(group, key=torch.Tensor.numel)
        with _left_out([at for at in everything if at is not largest], fake_optimizers):
            alone_bytes, _ = _step(fake_optimizers, line)
        share = max(share, alone_bytes / max(1, line.round(largest.nbytes)))
    return share


def _held_bytes(optimizers: Sequence[torch.optim.Optimizer], device_type: str) -> int:
    """Add up the states' storages on the device, each once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for optimizer in optimizers
        for tensor in state_tensors(optimizer)
        if tensor.device.type == device_type and not is_managed(tensor)
    }
    return sum(storages.values())


def _formats(choice: str, model: nn.Module, stepped: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Decide each parameter's format as the optimisers of that name do, and know embeddings by their modules."""
    embeddings = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }
    return {
        name: format_of(choice, name=name, shape=at.shape, embedding=name in embeddings or None)
        if _takes(choice, at)
        else "fp32"
        for name, at in stepped.items()
    }


def _low_bit(
    state_format: str,
    formats: Mapping[str, str],
    stepped: Mapping[str, torch.Tensor],
    line: FakeLine,
    *,
    rest: OptimizerCost,
    settings_of: Mapping[str, object],
) -> OptimizerCost:
    """Cost the optimisers with large parameters' states in a low-bit format, without making these."""
    large = {name: stepped[name] for name in formats}
    num_bytes = sum(state_bytes(at.shape, at.dtype, formats[name]) for name, at in large.items())
    num_bytes -= STEP_BYTES * sum(step_device(at.device).type != line.device_type for at in large.values())
    update_bytes = max((_update_bytes(state_format, at, settings_of, line) for at in _largest(large)), default=0)
    in_large = sum(at.numel() * line.rates.update_seconds[formats[name]] for name, at in large.items())
    return replace(
        rest,
        state_format=state_format,
        state_bytes=rest.state_bytes + num_bytes,
        temporary_bytes=max(update_bytes, rest.temporary_bytes),
        seconds=rest.seconds + in_large,
        formats={**rest.formats, **formats},
        alone_bytes=max(update_bytes, rest.alone_bytes),
    )


def _on_host(
    state_format: str,
    formats: Mapping[str, str],
    stepped: Mapping[str, torch.Tensor],
    line: FakeLine,
    *,
    rest: OptimizerCost,
) -> list[OptimizerCost]:
    """Cost the optimisers with large parameters' states in host memory; nothing where the CPU has no kernel."""
    rates, large = line.rates.host_update_seconds, {name: stepped[name] for name in formats}
    if not large or not all(map(_has_kernel, large.values())):
        return []
    num_bytes = sum(state_bytes(at.shape, at.dtype, formats[name]) for name, at in large.items())
    in_bytes = sum(at.nbytes for at in large.values())
    both = (each for at in large.values() for each in (at, at.grad) if each is not None)
    scattered = (each for each in both if not each.is_contiguous())
    copied_bytes = max((each.nbytes for each in scattered), default=0)  # made contiguous on the device
    hosted = replace(
        rest,
        state_format=state_format + ON_HOST,
        formats={**rest.formats, **{name: at + ON_HOST for name, at in formats.items()}},
        host_bytes=num_bytes + staging_bytes(large.values()),
        host_seconds=sum(at.numel() * rates[formats[name]] for name, at in large.items()),
        out_bytes=in_bytes + sum(at.grad.nbytes for at in large.values() if at.grad is not None),
        in_bytes=in_bytes,
        largest_share=max(at.nbytes for at in large.values()) / in_bytes,
        temporary_bytes=max(rest.temporary_bytes, copied_bytes),
        alone_bytes=max(rest.alone_bytes, copied_bytes),
    )
    return [hosted]


def _has_kernel(parameter: torch.Tensor) -> bool:
    """Tell whether the CPU has a kernel for a parameter; others are stepped there many times slower."""
    return parameter.dtype in (torch.float32, torch.bfloat16) and (
        parameter.grad is None or parameter.grad.dtype == parameter.dtype
    )


def _rest(
    large: frozenset[str],
    stepped: Mapping[str, torch.Tensor],
    fake_optimizers: Sequence[torch.optim.Optimizer],
    line: FakeLine,
    *,
    present: OptimizerCost,
) -> OptimizerCost:
    """Cost the optimisers as they are without large parameters."""
    with _left_out((stepped[name] for name in large), fake_optimizers):
        temporary_bytes, seconds = _step(fake_optimizers, line)
        held_bytes = _held_bytes(fake_optimizers, line.device_type)
    rest = (at for name, at in stepped.items() if name not in large)
    return OptimizerCost(
        state_format="fp32",
        state_bytes=held_bytes,
        temporary_bytes=temporary_bytes,
        seconds=seconds,
        formats=dict.fromkeys(stepped, "fp32"),
        num_elements={name: at.numel() for name, at in stepped.items()},
        alone_bytes=max((math.ceil(present.alone_share * line.round(at.nbytes)) for at in rest), default=0),
    )


@contextmanager
def _left_out(parameters: Iterable[torch.Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Let optimisers step without some parameters, of which they know neither gradients nor states meanwhile."""
    gradients = {parameter: parameter.grad for parameter in parameters}
    states = [{at: each.state.pop(at) for at in gradients if at in each.state} for each in optimizers]
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.state.update(state)


def _takes(state_format: str, parameter: torch.Tensor) -> bool:
    return moment_formats(state_format, tuple(parameter.shape))[0].coding != "fp32"


def _largest(parameters: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return sorted(parameters.values(), key=torch.Tensor.numel)[-1:]


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
