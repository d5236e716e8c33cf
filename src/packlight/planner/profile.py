"""Traces one training step on fake tensors: no memory, no arithmetic, and yet every storage's bytes, birth and death.

torch's own trackers follow one step under one choice of what is kept. The idea here: while the step is traced, a
saved-tensors hook lets go of every tensor that autograd wants to keep, and notes when it would have been released. So
the line of events shows each storage's natural end, and its end if it is kept stands beside it; from one trace the
peak of every plan can be computed (`cost.py`). Backward gets new fake tensors of the same shape, which nobody counts.

```
1 copy        model and optimiser are copied with fake tensors in place of real ones (tied and shared ones stay so)
2 forward     hooks on the blocks note the beginning and the end of each, and its inputs and outputs
3 loss        the caller's, the model's own, or a stand-in with the bytes that were seen in a real step (`Tail`)
4 backward    releases are noted as autograd lets go of what it saved
5 optimiser   two steps: the first makes the states, the second has only temporaries
```
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from packlight.activations.blocks import Block, find_blocks
from packlight.activations.recompute import follows_protocol, recompute, recomputes_itself
from packlight.numerics.formats import moment_formats
from packlight.optim.adopt import can_adopt
from packlight.optim.state import STEP_BYTES, group_settings, init_state, state_bytes, update
from packlight.planner.hardware import Rates, measure, operator_seconds
from packlight.planner.timeline import Timeline, flat_tensors
from packlight.step import OptimizerCost, Profile, Region, Save, Storage, Tail

Loss = Callable[[Any, Any], torch.Tensor]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


class ProfileError(RuntimeError):
    """The step could not be traced on fake tensors."""


@dataclass(frozen=True)
class Call:
    """How the model is called in a step."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> "Call":
        """Read a batch: a mapping is `model(**batch)`, a tuple `model(*batch)`, anything else `model(batch)`."""
        if isinstance(batch, Call):
            return batch
        if isinstance(batch, Mapping):
            return cls(kwargs=dict(batch))
        return cls(tuple(batch)) if isinstance(batch, tuple) else cls((batch,))


@dataclass(frozen=True)
class Seen:
    """What is known of the loop around the model, from the user or from a real first step.

    Attributes:
        tail: what the loss outside the model allocates; None: trace `loss`, the model's own, or a guess.
        num_microbatches: forward and backward passes for one optimiser step.
        gradients: how long gradients of the step before (or of earlier microbatches) live on: "none" where they are
            gone before forward, "forward" where they go between forward and backward, "step" where backward adds to them.
        other_bytes: bytes of tensors that are not of the model and the optimiser; None: buffers and the batch.
        keeps_outputs: whether the loop still holds the model's output when the next step begins.
    """

    tail: Tail | None = None
    num_microbatches: int = 1
    gradients: Literal["none", "forward", "step"] = "none"
    other_bytes: int | None = None
    keeps_outputs: bool = True


def profile(
    model: nn.Module,
    batch: Any,
    optimizer: Optimizers = None,
    *,
    loss: Loss | None = None,
    seen: Seen | None = None,
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

    Returns:
        The step as a record, from which `solve` makes plans.

    Raises:
        ProfileError: the step cannot be traced (values decide over shapes or control flow, or it raised).
    """
    seen = seen or Seen()
    trace = _Trace(model, optimizer, seen)
    notes: list[str] = []
    with torch.random.fork_rng(devices=[]), trace.active():
        call = trace.fake_call(Call.of(batch))
        trace.mark_resident(call, seen)
        try:
            output = trace.forward(call)
            scalar = _loss(output, batch=call, loss=loss, seen=seen, notes=notes)
            trace.backward(scalar)
            optimizers = trace.optimizers()
        except Exception as error:
            raise ProfileError(
                f"one step of {type(model).__name__} could not be traced on fake tensors "
                f"({type(error).__name__}: {error}); wanted a step whose shapes do not depend on values"
            ) from error
    step = trace.record(optimizers, tuple(notes))
    return _without(step, unrepeatable(model, Call.of(batch), list(dict.fromkeys(at.block for at in step.regions))))


def unrepeatable(model: nn.Module, call: Call, blocks: Sequence[str]) -> dict[str, str]:
    """Find the blocks whose forward cannot be run again, by doing it on fake tensors.

    Returns:
        The reason for each such block, by its path.
    """
    if not blocks or _repeat_error(model, call, blocks) is None:
        return {}
    kinds: dict[type, list[str]] = {}
    modules = {block.path: model.get_submodule(block.module_path) for block in find_blocks(model)}
    for path in blocks:
        kinds.setdefault(type(modules[path]), []).append(path)
    errors = ((paths, _repeat_error(model, call, paths)) for paths in kinds.values())
    return {path: error for paths, error in errors if error is not None for path in paths}


def _repeat_error(model: nn.Module, call: Call, blocks: Sequence[str]) -> str | None:
    """Run forward and backward with some blocks recomputed on fake tensors; return what went wrong."""
    trace = _Trace(model, None, Seen())
    with torch.random.fork_rng(devices=[]), trace.active(), recompute(trace.model, blocks):
        fake = trace.fake_call(call)
        try:
            with torch.enable_grad():
                output = trace.model(*fake.args, **fake.kwargs)
                sum(at.sum() for at in flat_tensors(output) if at.requires_grad).backward()  # type: ignore[union-attr]
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


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


def _loss(output: Any, *, batch: Call, loss: Loss | None, seen: Seen, notes: list[str]) -> torch.Tensor:
    """Return the scalar that backward starts from (step 3)."""
    tensors = list(flat_tensors(output))
    if seen.tail is not None:
        chosen = [tensors[position] for position in seen.tail.outputs if position < len(tensors)]
        return _SeenTail.apply(seen.tail, *chosen)  # type: ignore[no-any-return, no-untyped-call]
    if loss is not None:
        scalar = loss(output, batch.kwargs or (batch.args if len(batch.args) > 1 else batch.args[0]))
    else:
        scalar = output["loss"] if isinstance(output, Mapping) and "loss" in output else getattr(output, "loss", None)
        if scalar is None:
            scalar = _guess_loss(tensors, notes)
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
    def forward(ctx: Any, tail: Tail, *outputs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
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


class _FakeCopy(TorchFunctionMode):
    """Makes `copy.deepcopy` put fake tensors in place of real ones; meta tensors become fake CPU tensors."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.fake(tensor)
            return memo[id(tensor)]
        if func in (torch.Tensor.clone, torch._C.TensorBase.clone):
            return self.fake(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a fake tensor of the same shape, strides, dtype and (but for meta) device."""
        if isinstance(tensor, FakeTensor) or tensor.device.type != "meta":
            return self._mode.from_tensor(tensor, static_shapes=True)
        with self._mode, torch.no_grad():
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return made.requires_grad_(tensor.requires_grad)


@dataclass
class _Region:
    """A block's call while it is traced."""

    block: str
    start: int
    inputs: tuple[int, ...]
    protocol: bool
    end: int = 0
    last_packed: int = 0
    unpacked: int | None = None
    outputs: tuple[int, ...] = ()
    seconds: float = 0.0


class _Held:
    """What autograd holds instead of a saved tensor: enough to make another of its kind."""

    __slots__ = ("__weakref__", "device", "dtype", "region", "shape", "stride")

    def __init__(self, tensor: torch.Tensor, region: int) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        self.device, self.region = tensor.device, region


class _Line(Timeline):
    """A timeline of fake storages that also adds up the operators' seconds."""

    def __init__(self, device_type: str, rates: Rates) -> None:
        super().__init__(device_type)
        self.rates, self.seconds = rates, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.explicit_phase == "optimizer":
            return 1.0 if args[0].dtype.is_floating_point else 1  # an optimiser reads its own step count
        return super().__torch_dispatch__(func, types, args, kwargs)

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        super().observe(func, args, kwargs, out)
        self.seconds += operator_seconds(self.rates, func, args, kwargs, out)


class _Trace:
    """One step on fake tensors, on the way to a `Profile`."""

    def __init__(self, model: nn.Module, optimizer: Optimizers, seen: Seen) -> None:
        self.seen, self.real_model = seen, model
        single = isinstance(optimizer, torch.optim.Optimizer)
        self.real_optimizers = [optimizer] if single else list(optimizer or ())  # type: ignore[arg-type]
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._copy = _FakeCopy(self.mode)
        with self._copy:
            self.model, self.fake_optimizers = copy.deepcopy((model, self.real_optimizers))
        first = next((tensor.device.type for tensor in model.parameters()), "cpu")
        self.device_type = "cpu" if first == "meta" else first
        self.line = _Line(self.device_type, measure(self.device_type if first != "meta" else "cpu"))
        self.regions: list[_Region] = []
        self.saves: list[list[int]] = []
        self._inside: list[int] = []
        self.resident: dict[str, int] = {}
        self.num_resident = self.num_events = self.forward_end = self.backward_start = 0
        self.seconds = 0.0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Push the fake mode and the line of events; let go of both afterwards."""
        try:
            with self.mode, self.line:
                yield
        finally:
            self.line.close()

    def fake_call(self, call: Call) -> Call:
        fake = tree_map_only(torch.Tensor, self._copy.fake, (call.args, dict(call.kwargs)))
        return Call(*fake)

    def mark_resident(self, call: Call, seen: Seen) -> None:
        """Put what lives before the step at the head of the line (step 1)."""
        for parameter in self.model.parameters():
            parameter.grad = None
            self.line.add(parameter, category="parameters")
            if seen.gradients == "step" and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                self.line.add(parameter.grad, category="gradients")
        for tensor in (*self.model.buffers(), *flat_tensors((call.args, dict(call.kwargs)))):
            if self.line.index(tensor) is None:
                self.line.add(tensor, category="other")
        self.num_resident = len(self.line.entries)
        self.resident = dict.fromkeys(("parameters", "gradients", "other"), 0)
        for entry in self.line.entries:
            self.resident[entry.category or "other"] += entry.num_bytes
        if seen.other_bytes is not None:
            self.resident["other"] = seen.other_bytes

    def forward(self, call: Call) -> Any:
        """Run the model's forward with hooks on its blocks (step 2)."""
        for block in find_blocks(self.model):
            self._hook(block)
        if self.seen.gradients == "forward":
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.line.explicit_phase = "forward"
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            output = self.model(*call.args, **call.kwargs)
        self.line.explicit_phase = None
        self.forward_end = self.line.now()
        return output

    def _hook(self, block: Block) -> None:
        module = self.model.get_submodule(block.module_path)
        if recomputes_itself(module):
            return
        first = module if block.start is None else module[block.start]  # type: ignore[index]
        last = module if block.stop is None else module[block.stop - 1]  # type: ignore[index]
        protocol = follows_protocol(module)

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                self._inside.append(len(self.regions))
                region = _Region(block.path, self.line.now(), self._indices((args, kwargs)), protocol)
                region.seconds = -self.line.seconds
                self.regions.append(region)

        def end(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                region = self.regions[self._inside.pop()]
                region.end, region.outputs = self.line.now(), self._indices(output)
                region.seconds += self.line.seconds

        first.register_forward_pre_hook(begin, with_kwargs=True, prepend=True)
        last.register_forward_hook(end, with_kwargs=True)

    def _indices(self, value: object) -> tuple[int, ...]:
        indices = (self.line.index(tensor) for tensor in flat_tensors(value))
        return tuple(sorted({index for index in indices if index is not None and index >= self.num_resident}))

    def _pack(self, tensor: torch.Tensor) -> Any:
        index = self.line.index(tensor)
        region = self._inside[-1] if self._inside else -1
        if region >= 0:
            self.regions[region].last_packed = self.line.now()
        if index is None or index < self.num_resident:
            return tensor
        save = [index, region, self.line.now(), -1]
        self.saves.append(save)
        held = _Held(tensor, region)
        weakref.finalize(held, self._release, save)
        return held

    def _release(self, save: list[int]) -> None:
        save[3] = self.line.now()

    def _unpack(self, held: Any) -> torch.Tensor:
        if isinstance(held, torch.Tensor):
            return held
        if held.region >= 0 and self.regions[held.region].unpacked is None:
            self.regions[held.region].unpacked = self.line.now()
        with self.line.paused():
            made = torch.empty_strided(held.shape, held.stride, dtype=held.dtype, device=held.device)
        self.line.leave_out(made)
        return made

    def backward(self, scalar: torch.Tensor) -> None:
        """Run backward (step 4), and note which storages are gradients."""
        if self.seen.gradients == "forward":
            self._name_gradients()
            self.model.zero_grad()
        self.backward_start = self.line.now()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            scalar.backward()  # type: ignore[no-untyped-call]
        self.num_events = self.line.now()
        self.seconds = self.line.seconds
        self._name_gradients()

    def _name_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                self.line.add(parameter.grad, category="gradients")

    def optimizers(self) -> tuple[OptimizerCost, ...]:
        """Trace the optimiser as it is, and ask for the cost of the formats it could have (step 5)."""
        if not self.real_optimizers:
            return ()
        self.line.explicit_phase = "optimizer"
        with torch.no_grad():
            self._step()
            before_bytes, before_seconds = self.line.live_bytes, self.line.seconds
            self.line.highest_bytes()
            self._step()
        names = {
            at: name for each in self.real_optimizers for at, name in parameter_names(self.real_model, each).items()
        }
        known = all(can_adopt(optimizer) is None for optimizer in self.real_optimizers)
        present_format = "fp32" if known else "as is"
        present = OptimizerCost(
            state_format=present_format,
            state_bytes=self._state_bytes(),
            temporary_bytes=self.line.highest_bytes() - before_bytes,
            seconds=self.line.seconds - before_seconds,
            formats=dict.fromkeys(names.values(), present_format),
        )
        return (present, self._low_bit("paper4bit", names)) if known else (present,)

    def _step(self) -> None:
        for optimizer in self.fake_optimizers:
            optimizer.step()

    def _low_bit(self, state_format: str, names: Mapping[torch.Tensor, str]) -> OptimizerCost:
        """Cost the optimiser with states in a low-bit format, without making them all."""
        shapes = {name: tuple(parameter.shape) for parameter, name in names.items()}
        step_bytes = 0 if self.device_type == "cpu" else STEP_BYTES  # the step counter stays on the CPU
        num_bytes = sum(state_bytes(at.shape, at.dtype, state_format) - step_bytes for at in names)
        return OptimizerCost(
            state_format=state_format,
            state_bytes=num_bytes,
            temporary_bytes=self._update_bytes(state_format, max(names, key=torch.Tensor.numel)),
            seconds=sum(map(math.prod, shapes.values())) * self.line.rates.update_seconds_per_element,
            formats={
                name: "fp32" if moment_formats(state_format, shape)[0].book is None else state_format
                for name, shape in shapes.items()
            },
        )

    def _update_bytes(self, state_format: str, parameter: torch.Tensor) -> int:
        """Return the most that the update of one parameter allocates beside its state."""
        with torch.no_grad():
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device_type)
            state, settings = init_state(fake, state_format), group_settings(self.real_optimizers[0].param_groups[0])
            before_bytes = self.line.live_bytes
            self.line.highest_bytes()
            update(fake, fake, state, state_format=state_format, settings=settings)
        return self.line.highest_bytes() - before_bytes

    def _state_bytes(self) -> int:
        """Add up the states' storages on the device, each once."""
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for optimizer in self.fake_optimizers
            for tensor in flat_tensors(list(optimizer.state.values()))
            if tensor.device.type == self.device_type
        }
        return sum(storages.values())

    def record(self, optimizers: tuple[OptimizerCost, ...], notes: tuple[str, ...]) -> Profile:
        """Return the trace as a record."""
        return Profile(
            device=self.device_type,
            resident_bytes=self.resident,
            num_events=self.num_events,
            forward_end=self.forward_end,
            backward_start=self.backward_start,
            storages=self._storages(),
            saves=tuple(
                Save(index - self.num_resident, region, packed, released if released >= 0 else self.num_events)
                for index, region, packed, released in self.saves
            ),
            regions=tuple(self._region(region) for region in self.regions),
            optimizers=optimizers,
            num_microbatches=self.seen.num_microbatches,
            seconds=self.seconds,
            after_backward_bytes=self.seen.tail.after_backward_bytes if self.seen.tail else 0,
            carries_outputs=self.seen.keeps_outputs,
            notes=notes,
        )

    def _storages(self) -> tuple[Storage, ...]:
        made = (entry for entry in self.line.entries[self.num_resident :] if entry.born < self.num_events)
        return tuple(
            Storage(
                num_bytes=entry.num_bytes,
                born=entry.born,
                died=min(self.num_events, self.num_events if entry.died is None else entry.died),
                phase=entry.phase,
                is_gradient=entry.category == "gradients",
            )
            for entry in made
        )

    def _region(self, region: _Region) -> Region:
        shift = self.num_resident
        return Region(
            block=region.block,
            start=region.start,
            end=region.end,
            last_packed=region.last_packed,
            unpacked=self.num_events if region.unpacked is None else region.unpacked,
            inputs=tuple(index - shift for index in region.inputs),
            outputs=tuple(index - shift for index in region.outputs),
            forward_seconds=region.seconds,
            drops_side_outputs=region.protocol,
        )


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, str]:
    """Name an optimiser's parameters as the model names them; "parameter N" for those outside the model."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {parameter: names.get(parameter, f"parameter {at}") for at, parameter in enumerate(stepped)}
