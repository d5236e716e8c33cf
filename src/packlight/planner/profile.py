"""Profiles a training step before it runs: one trace on fake tensors, with the loss that the loop will compute.

torch has parts of this (`MemTracker`, `FakeTensorMode`) and leaves out the half of a step that stands outside the
model. Here the loss is the caller's function, the model's own, a guess that says so, or, once a real step has been
seen, a stand-in that allocates what the real loss allocated. Blocks whose forward cannot be run twice are found on
fake tensors too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from packlight.activations.blocks import find_blocks
from packlight.activations.recompute import recompute
from packlight.planner.known_hardware import Hardware, named
from packlight.planner.loop import Call, Loss, Optimizers, Seen
from packlight.planner.timeline import flat_tensors
from packlight.planner.trace import Trace
from packlight.step import Profile, Tail


class ProfileError(RuntimeError):
    """The step could not be traced on fake tensors."""


def profile(
    model: nn.Module,
    batch: Any,
    optimizer: Optimizers = None,
    *,
    loss: Loss | None = None,
    seen: Seen | None = None,
    hardware: str | None = None,
) -> Profile:
    """Trace one training step of a model on fake tensors.

    Nothing is computed on the device and nothing of the caller's is changed. Tensors on the meta device are taken as
    tensors on the CPU.

    Args:
        model: the module that is trained; its parameters may be on any device, the meta device too.
        batch: what the model takes: a mapping, a tuple or one tensor (see `Call.of`).
        optimizer: the optimiser that steps, or several of one model; None: only forward and backward.
        loss: a function of (output, batch) that returns a scalar; None: `output.loss`, or the output if it is a scalar.
        seen: what is known of the loop around the model.
        hardware: the name of a device whose rates and allocator are taken instead of this machine's; see `plan`.

    Returns:
        The step as a record, from which `solve` makes plans.

    Raises:
        ProfileError: the step cannot be traced (values decide over shapes or control flow, or it raised).
        ValueError: there is no hardware of this name.
    """
    seen, known = seen or Seen(), named(hardware)
    trace = _begin(model, optimizer, seen, known)
    notes = [] if known is None else [known.note(trace.device_type)]
    with torch.random.fork_rng(devices=[]), trace.active():
        call = trace.fake_call(Call.of(batch))
        trace.mark_resident(call, seen)
        try:
            with call.autocasting():
                output = trace.forward(call)
                scalar = _loss(output, batch=call, loss=loss, seen=seen, notes=notes)
            held = _held(output, seen)
            del output
            trace.backward(scalar)
            del held
            optimizers = trace.optimizers()
        except Exception as error:
            raise ProfileError(
                f"one step of {type(model).__name__} could not be traced on fake tensors "
                f"({type(error).__name__}: {error}); wanted a step that neither reads values (.item(), an assert on a "
                "tensor) nor has shapes that depend on them"
            ) from error
    step = trace.record(optimizers, tuple(notes))
    blocks = list(dict.fromkeys(at.block for at in step.regions))
    return _without(step, unrepeatable(model, Call.of(batch), blocks, hardware=known))


def unrepeatable(
    model: nn.Module, call: Call, blocks: Sequence[str], *, hardware: Hardware | None = None
) -> dict[str, str]:
    """Find the blocks whose forward cannot be run again, by doing it on fake tensors.

    Returns:
        The reason for each such block, by its path.
    """
    if not blocks or _repeat_error(model, call, blocks, hardware) is None:
        return {}
    kinds: dict[type, list[str]] = {}
    modules = {block.path: model.get_submodule(block.module_path) for block in find_blocks(model)}
    for path in blocks:
        kinds.setdefault(type(modules[path]), []).append(path)
    errors = ((paths, _repeat_error(model, call, paths, hardware)) for paths in kinds.values())
    return {path: error for paths, error in errors if error is not None for path in paths}


def _repeat_error(model: nn.Module, call: Call, blocks: Sequence[str], hardware: Hardware | None) -> str | None:
    """Run forward and backward with some blocks recomputed on fake tensors; return what went wrong."""
    trace = _begin(model, None, Seen(), hardware)
    with torch.random.fork_rng(devices=[]), trace.active(), recompute(trace.model, blocks):
        fake = trace.fake_call(call)
        try:
            with torch.enable_grad():
                before = _attributes(trace.model, blocks)
                with fake.autocasting():
                    output = trace.model(*fake.args, **fake.kwargs)
                changed = [key for key, value in _attributes(trace.model, blocks).items() if before.get(key) != value]
                if changed:
                    return f"its forward changes the attribute {changed[0][1]!r}"
                sum(at.sum() for at in flat_tensors(output) if at.requires_grad).backward()  # type: ignore[union-attr]
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def _begin(model: nn.Module, optimizer: Optimizers, seen: Seen, hardware: Hardware | None) -> Trace:
    try:
        return Trace(model, optimizer, seen, hardware=hardware)
    except Exception as error:
        raise ProfileError(
            f"{type(model).__name__} and its optimiser cannot be copied ({type(error).__name__}: {error}); "
            "wanted modules without locks, generators and the like in their attributes"
        ) from error


def _attributes(model: nn.Module, blocks: Sequence[str]) -> dict[tuple[int, str], Any]:
    """Return what tells whether plain attributes inside blocks have changed; a second run would change them again."""
    own = vars(nn.Module())
    paths = {block.path: block.module_path for block in find_blocks(model)}
    owners = {id(owner): owner for path in blocks for owner in model.get_submodule(paths[path]).modules()}
    plain = (int, float, str, type(None))
    return {
        (key, name): value if isinstance(value, plain) else (id(value), len(value) if hasattr(value, "__len__") else 0)
        for key, owner in owners.items()
        for name, value in vars(owner).items()
        if name not in own and not isinstance(value, torch.Tensor | nn.Module)
    }


def _without(step: Profile, reasons: Mapping[str, str]) -> Profile:
    """Take blocks out of a profile's choices: what they save is kept."""
    if not reasons:
        return step
    kept = [at for at, region in enumerate(step.regions) if region.block not in reasons]
    places = {at: place for place, at in enumerate(kept)}
    path, reason = next(iter(reasons.items()))
    return replace(
        step,
        regions=tuple(step.regions[at] for at in kept),
        saves=tuple(replace(save, region=places.get(save.region, -1)) for save in step.saves),
        notes=(*step.notes, f"{len(reasons)} blocks ({path}, ...) cannot be recomputed: {reason}"),
    )


def _held(output: Any, seen: Seen) -> Any:
    """Return what of the model's output the loop holds while backward runs; caches in it go with the rest."""
    if seen.held_outputs is None:
        return output
    return [tensor for at, tensor in enumerate(flat_tensors(output)) if at in seen.held_outputs]


def _loss(output: Any, *, batch: Call, loss: Loss | None, seen: Seen, notes: list[str]) -> torch.Tensor:
    """Return the scalar that backward starts from (step 3)."""
    tensors = list(flat_tensors(output))
    if seen.tail is not None:
        num_outputs = len(tensors) // seen.num_forwards
        passes = range(0, num_outputs * seen.num_forwards, num_outputs) if num_outputs else ()
        chosen = [tensors[start + at] for start in passes for at in seen.tail.outputs if at < num_outputs]
        return _SeenTail.apply(seen.tail, *chosen)  # type: ignore[no-any-return, no-untyped-call]
    if loss is not None:
        scalar: Any = loss(output, batch.kwargs or (batch.args if len(batch.args) > 1 else batch.args[0]))
    else:
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        scalar = _guess_loss(tensors, notes) if own is None else own
    if not isinstance(scalar, torch.Tensor) or scalar.numel() != 1 or not scalar.requires_grad:
        raise ValueError(f"the loss is {scalar!r}; wanted a scalar tensor that depends on parameters")
    return scalar


def _guess_loss(tensors: list[torch.Tensor], notes: list[str]) -> torch.Tensor:
    """Stand in for a loss that is computed outside the model: a cross-entropy over the last dimension."""
    output = next((tensor for tensor in tensors if tensor.is_floating_point() and tensor.requires_grad), None)
    if output is None:
        raise ValueError("the model returned no tensor that depends on parameters")
    if output.numel() == 1:
        return output.reshape(())
    notes.append("the loss outside the model is taken as a cross-entropy until it has been seen")
    rows = output.reshape(-1, output.shape[-1]) if output.dim() > 1 else output.reshape(1, -1)
    return F.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))


class _SeenTail(torch.autograd.Function):
    """Allocates what the real loss was seen to allocate, and hands a gradient to the outputs that got one."""

    @staticmethod
    def forward(ctx: Any, tail: Tail, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.tail, ctx.outputs = tail, [(output.shape, output.dtype, output.device) for output in outputs]
        device = outputs[0].device if outputs else "cpu"
        torch.empty(tail.forward_peak_bytes, dtype=torch.uint8, device=device)
        ctx.saved = torch.empty(tail.saved_bytes, dtype=torch.uint8, device=device)
        return torch.zeros((), device=device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        extra_bytes = max(0, ctx.tail.backward_peak_bytes - ctx.tail.saved_bytes)
        torch.empty(extra_bytes, dtype=torch.uint8, device=ctx.saved.device)
        ctx.saved = None
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.outputs]
        return None, *made
