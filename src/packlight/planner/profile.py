"""Profiles a training step before it runs: one trace on fake tensors, with the loss that the loop will compute.

torch has parts of this (`MemTracker`, `FakeTensorMode`) and leaves out the half of a step that stands outside the
model. Here the loss is the caller's function, the model's own, a guess that says so, or, once a real step has been
seen, a stand-in that allocates what the real loss allocated.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn import functional as F

from packlight.planner.answers import Answers
from packlight.planner.known_hardware import Hardware, named
from packlight.planner.loop import Call, Loss, Optimizers, Seen
from packlight.planner.repeats import without_unrepeatable
from packlight.planner.sharded import on_rank
from packlight.planner.tensors import flat_tensors
from packlight.planner.trace import Trace
from packlight.step import Link, Profile, Tail

ASKED = (
    "shapes or branches of the model depend on values: one forward was run on the batch to learn them, and another "
    "batch may need more or less"
)
"""The note of a profile for which a real forward ran."""


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
    link: Link | None = None,
) -> Profile:
    """Trace one training step of a model on fake tensors.

    Nothing is computed on the device and nothing of the caller's is changed. Tensors on the meta device are taken as
    tensors on the CPU. Where values of activations decide over shapes or control flow, one real forward (and the loss)
    runs without gradients, to learn them; random states and buffers are put back after it, and a note says so.

    Args:
        model: the module that is trained; its parameters may be on any device, the meta device too.
        batch: what the model takes: a mapping, a tuple or one tensor (see `Call.of`).
        optimizer: the optimiser that steps, or several of one model; None: only forward and backward.
        loss: a function of (output, batch) that returns a scalar; None: `output.loss`, or the output if it is a scalar.
        seen: what is known of the loop around the model.
        hardware: the name of a device whose rates and allocator are taken instead of this machine's; see `plan`.
        link: the way to a tier that plans may use; with one to the host, states there are costed too.

    Returns:
        The step as a record, from which `solve` makes plans.

    Raises:
        ProfileError: the step cannot be traced (it raised; or values decide over shapes, and there is no real forward
            to learn them from, as on the meta device).
        ValueError: there is no hardware of this name.
    """
    seen, known, call, answers = seen or Seen(), named(hardware), Call.of(batch), None
    trace = functools.partial(_traced, model, call, optimizer, loss=loss, seen=seen, hardware=known, link=link)
    try:
        step = trace()
    except ProfileError as error:
        if not _asks_for_values(error) or known is not None or _is_meta(model):
            raise
        answers = _answers(model, call, loss=loss)
        step = trace(answers=answers)
        step = replace(step, notes=(*step.notes, ASKED))
    return without_unrepeatable(step, model, call, hardware=known, answers=answers)


def _traced(
    model: nn.Module,
    call: Call,
    optimizer: Optimizers,
    *,
    loss: Loss | None,
    seen: Seen,
    hardware: Hardware | None,
    link: Link | None,
    answers: Answers | None = None,
) -> Profile:
    trace = _begin(model, optimizer, seen, hardware, answers)
    notes = [] if hardware is None else [hardware.note(trace.device_type)]
    with torch.random.fork_rng(devices=[]), trace.active():
        fake = trace.fake_call(call)
        trace.mark_resident(fake, seen)
        try:
            with fake.autocasting():
                output = trace.forward(fake)
                with torch.enable_grad():  # as in forward: the caller may plan where it records nothing
                    scalar = _loss(output, batch=fake, loss=loss, seen=seen, notes=notes)
            held = _held(output, seen)
            del output
            trace.backward(scalar)
            del held
            optimizers = trace.optimizers(on_host=link is not None and link.tier == "host")
        except Exception as error:
            raise ProfileError(
                f"one step of {type(model).__name__} could not be traced on fake tensors "
                f"({type(error).__name__}: {error}); wanted a step that can run on tensors without values; where "
                "shapes or branches depend on values, a model that is not on the meta device, and no other hardware"
            ) from error
    step = replace(trace.record(optimizers, tuple(notes)), link=link)
    return step if trace.cut is None else on_rank(step, trace.cut.sharding, resident=trace.cut.resident)


def _begin(
    model: nn.Module, optimizer: Optimizers, seen: Seen, hardware: Hardware | None, answers: Answers | None
) -> Trace:
    try:
        return Trace(model, optimizer, seen, hardware=hardware, answers=answers)
    except Exception as error:
        raise ProfileError(
            f"{type(model).__name__} and its optimiser cannot be copied ({type(error).__name__}: {error}); "
            "wanted modules without locks, generators and the like in their attributes"
        ) from error


def _answers(model: nn.Module, call: Call, *, loss: Loss | None) -> Answers:
    """Ask a real forward, and the loss."""
    try:
        return Answers.of(model, call, lambda output, own: None if loss is None else loss(output, _batch_of(own)))
    except Exception as error:
        raise ProfileError(
            f"shapes or branches of {type(model).__name__} depend on values, and the real forward that was to tell "
            f"them failed ({type(error).__name__}: {error}); try a smaller batch, or mend the model"
        ) from error


def _asks_for_values(error: BaseException | None) -> bool:
    """Tell whether an error, or what led to it, is that fake tensors have no values."""
    while error is not None:
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _batch_of(call: Call) -> Any:
    """Return the batch that a call was read from."""
    return call.kwargs or (call.args if len(call.args) > 1 else call.args[0])


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
        scalar: Any = loss(output, _batch_of(batch))
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
