"""Traces one training step on fake tensors: no memory, no arithmetic, and yet every storage's bytes, birth and death.

torch's own trackers follow one step under one choice of what is kept. The idea here: while the step is traced, a
saved-tensors hook lets go of every tensor that autograd wants to keep, and notes when it would have been released. So
the line of events shows each storage's natural end, and its end if it is kept stands beside it; from one trace the
peak of every plan can be computed (`cost.py`). Backward gets new fake tensors of the same shape, which nobody counts.

```
1 copy        model and optimiser are copied with fake tensors in place of real ones (tied and shared ones stay so)
2 forward     hooks on the blocks note the beginning and the end of each, and its inputs and outputs
3 loss        whatever `profile.py` hands over
4 backward    releases are noted as autograd lets go of what it saved
5 optimiser   two steps: the first makes the states, the second has only temporaries
```
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from packlight.activations.blocks import Block, find_blocks
from packlight.activations.buffers import drawn_state, set_drawn_state
from packlight.activations.compress import Compared, encoding_of, is_relu
from packlight.activations.engine import MIN_BYTES
from packlight.activations.recompute import copied_buffers, follows_protocol, recomputes_itself
from packlight.activations.resident import Resident
from packlight.activations.saver import is_worth_it
from packlight.activations.sites import CallStack, ModuleWatch
from packlight.optim.adopted_state import without_compact
from packlight.optim.early import can_update_early
from packlight.planner.answers import Answers
from packlight.planner.chatter import quiet
from packlight.planner.cut import cut_of, used_in, without_engine
from packlight.planner.draft import Draft, DraftRegion, DraftSave, HeldSave
from packlight.planner.fake import FakeCopy, FakeLine
from packlight.planner.hardware import measure
from packlight.planner.known_hardware import Hardware
from packlight.planner.likeness import attached, likeness
from packlight.planner.loop import Call, Optimizers, Seen, listed
from packlight.planner.places import Places
from packlight.planner.tensors import flat_tensors
from packlight.planner.updates import notes_on, optimizer_costs, step_as_on_cuda
from packlight.step import OptimizerCost, Profile


class Trace:
    """One step on fake tensors, on the way to a `Profile`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        seen: Seen,
        *,
        hardware: Hardware | None = None,
        answers: Answers | None = None,
    ) -> None:
        self.seen, self.real_model, self.hardware, self._answers = seen, model, hardware, answers
        self.real_optimizers = listed(optimizer)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.cut = cut_of(model)
        used = used_in(model, self.cut, dtype=seen.param_dtype)
        self._copy = FakeCopy(self.mode)
        with _disable_current_modes(), without_engine(model), self._copy, without_compact(self.real_optimizers):
            memo = self._copy.memo(model.parameters(), used.whole)
            self.model, self.fake_optimizers = likeness(model, self.real_optimizers, memo, self._copy.fake)
        first = next((tensor.device.type for tensor in model.parameters()), "cpu")
        self.device_type = "cpu" if first == "meta" else first
        if hardware is None:
            self.line = FakeLine(self.device_type, measure(self.device_type), answers=answers)
        else:
            self.line = FakeLine(self.device_type, hardware.rates(), allocator="cuda", answers=answers)
        if hardware is not None or self.device_type == "cuda":
            step_as_on_cuda(self.fake_optimizers)
        self.regions: list[DraftRegion] = []
        self.saves: list[DraftSave] = []
        self._inside: list[int] = []
        self._calls: CallStack | None = None
        self._compared, self._lasting = Compared(), Resident((), ())
        self._named: set[int] = set()
        self.notes: list[str] = []
        self._hooks: list[RemovableHandle | ModuleWatch] = [*used.cast(self.model)]
        self.resident: dict[str, int] = {}
        self.num_resident = self.num_saves = self.num_events = self.forward_end = self.backward_start = 0
        self.seconds = self.forward_seconds = 0.0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Push the fake mode and the line of events; what the model prints or logs meanwhile is left out."""
        drawn = drawn_state()
        try:
            with ExitStack() as stack:
                stack.enter_context(_disable_current_modes())  # the script's own modes shall not see the trace
                for context in (quiet(), self.line.known.told(), self.mode, self.line):
                    stack.enter_context(context)
                yield
        finally:
            set_drawn_state(drawn)
            self.line.close()
            while self._hooks:  # they hold the trace, and with it every fake tensor
                self._hooks.pop().remove()

    def fake_call(self, call: Call) -> Call:
        """Return the call with fake tensors in place of real ones."""

        def take(tensor: torch.Tensor) -> torch.Tensor:
            made = self._copy.fake(tensor)
            self.line.known.learn(made, tensor)
            return made

        with self.line.paused():  # the loader made them, not the step
            fake = tree_map_only(torch.Tensor, take, (call.args, dict(call.kwargs)))
        return replace(call, args=fake[0], kwargs=fake[1])

    def mark_resident(self, call: Call, seen: Seen) -> None:
        """Put what lives before the step at the head of the line (step 1)."""
        for parameter in self.model.parameters():
            parameter.grad = None
            self.line.add(parameter, category="parameters")
            if seen.gradients == "step" and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                self.line.add(parameter.grad, category="gradients")
        batch = list(flat_tensors((call.args, dict(call.kwargs))))
        self.batch_bytes = sum(tensor.nbytes for tensor in batch)
        for tensor in (*self.model.buffers(), *attached(self.model.parameters()), *batch):
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
        self.line.explicit_phase, self.line.places = "forward", Places(self.model)
        self.line.reads.inside(self._inside)
        self._lasting = Resident([*self.model.parameters(), *self.model.buffers()], (call.args, call.kwargs))
        names = ModuleWatch(self.model, lambda: self._calls)
        names.name_calls()
        self._hooks.append(names)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            outputs = [self._call(call) for _ in range(self.seen.num_forwards)]
        self.line.explicit_phase = None
        self.forward_end, self.forward_seconds = self.line.now(), self.line.seconds
        return outputs if len(outputs) > 1 else outputs[0]

    def _call(self, call: Call) -> Any:
        self._calls, self._compared = CallStack(), Compared()
        if self._answers is not None:
            self._answers.begin()
        try:
            return self.model(*call.args, **call.kwargs)
        finally:
            self._calls = None

    def _hook(self, block: Block) -> None:
        module = self.model.get_submodule(block.module_path)
        protocol = follows_protocol(module)
        if recomputes_itself(module) or (protocol and not module.training):  # the switch works in training only
            return
        layers = [module] if block.start is None else list(module)[block.start : block.stop]  # type: ignore[call-overload]
        buffers = copied_buffers(*layers)

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                self._inside.append(len(self.regions))
                region = DraftRegion(block.path, self.line.now(), self._indices((args, kwargs)), protocol)
                region.seconds = -self.line.seconds
                region.copied = {self.line.index(buffer): self.line.round(buffer.nbytes) for buffer in buffers}
                region.copied_bytes = sum(self.line.round(buffer.nbytes) for buffer in buffers)
                self.regions.append(region)

        def end(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                region = self.regions[self._inside.pop()]
                region.end, region.outputs = self.line.now(), self._indices(output)
                region.seconds += self.line.seconds

        self._hooks.append(layers[0].register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
        self._hooks.append(layers[-1].register_forward_hook(end, with_kwargs=True))

    def _indices(self, value: object) -> tuple[int, ...]:
        indices = (self.line.index(tensor) for tensor in flat_tensors(value))
        return tuple(sorted({index for index in indices if index is not None and index >= self.num_resident}))

    def _pack(self, tensor: torch.Tensor) -> HeldSave:
        index = self.line.index(tensor)
        region = self._inside[-1] if self._inside else -1
        if region >= 0:
            self.regions[region].note_save(self.line.now())
        copied = region >= 0 and index in self.regions[region].copied
        stays = (index is None or index < self.num_resident) and not copied
        save = DraftSave(-1 if index is None else index, region, self.line.now(), packed_seconds=self.line.seconds)
        if self._calls is not None:
            self.num_saves += 1
            self._keep_exact(self._compared.saved_beside(tensor))
            self._describe(save, tensor)
        if not stays:
            (self.regions[region].copy_saves if copied else self.saves).append(save)
        is_number = not (tensor.is_floating_point() or tensor.is_complex())
        noted = self.line.known.noted(tensor) if is_number else None
        held = HeldSave(tensor, save, stays=stays, noted=noted)
        weakref.finalize(held, self._release, save)
        return held

    def _describe(self, save: DraftSave, tensor: torch.Tensor) -> None:
        """Name a save in the model's forward as the engine will, and say what the engine could do with it."""
        assert self._calls is not None
        save.site = str(self._calls.calls[-1].next_site())
        save.num_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        if self._lasting.holds(tensor) or not is_worth_it(tensor, min_bytes=MIN_BYTES):
            return
        is_first = save.storage not in self._named
        self._named.add(save.storage)
        save.encoding = "sign" if is_first and is_relu(tensor) else encoding_of(tensor) or "bytes"

    def _keep_exact(self, packed: list[Any]) -> None:
        """Note what may not be rounded, as the engine does: a function that is known by now compares it."""
        storages = {held.save.storage for held in packed if isinstance(held, HeldSave)}
        for save in self.saves if storages else ():
            if save.storage in storages and save.encoding == "codes":
                save.encoding = "bytes"

    def _release(self, save: DraftSave) -> None:
        save.released = self.line.tick()
        if save.region >= 0:
            self.regions[save.region].released = save.released

    def _use_ends(self, save: DraftSave) -> None:
        save.used = self.line.tick()

    def _unpack(self, held: HeldSave) -> torch.Tensor:
        region = held.save.region
        if region >= 0 and self.regions[region].unpacked is None:
            self.regions[region].unpacked = self.line.tick()
        if held.stays is not None:
            return held.stays
        if held.save.unpacked is None:
            held.save.unpacked, held.save.unpacked_seconds = self.line.tick(), self.line.seconds
        with self.line.paused():
            made = torch.empty_strided(held.shape, held.stride, dtype=held.dtype, device=held.device)
        self.line.leave_out(made)
        if held.noted is not None:
            self.line.known.note(made, held.noted)
        weakref.finalize(made.untyped_storage(), self._use_ends, held.save)
        return made

    def backward(self, scalar: torch.Tensor) -> None:
        """Run backward (step 4), and note which storages are gradients."""
        if self.seen.gradients == "forward":
            self._name_gradients()
            self.model.zero_grad()
        self._grow_outer_gradients()
        self._note_completion()
        self.backward_start = self.line.now()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            scalar.backward()
        self.num_events, self.seconds, self.line.reads.is_on = self.line.now(), self.line.seconds, False
        self.engine = self.line.engine_seconds(self.num_saves)
        self._name_gradients()

    def _note_completion(self) -> None:
        """Note when the gradient of each parameter that an optimiser steps is complete, if that may be at once."""
        if any(can_update_early(optimizer) for optimizer in self.real_optimizers):
            return

        def note(parameter: torch.Tensor) -> None:
            index = None if parameter.grad is None else self.line.index(parameter.grad)
            if index is not None:
                self.line.entries[index].completed = self.line.tick()
                self.line.reads.complete(parameter, self.line.now())

        for group in (group for optimizer in self.fake_optimizers for group in optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(note))

    def _grow_outer_gradients(self) -> None:
        """Give a gradient to parameters that are stepped but stand outside the model (a head called by the loop)."""
        own = set(self.model.parameters())
        for group in (group for optimizer in self.fake_optimizers for group in optimizer.param_groups):
            for parameter in group["params"]:
                if parameter not in own and parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
                    self.line.add(parameter.grad, category="gradients")

    def _name_gradients(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.line.add(parameter.grad, category="gradients", site=f"gradient of {name}")

    def optimizers(self, *, on_host: bool) -> tuple[OptimizerCost, ...]:
        """Ask what the optimisers cost as they are, and in the formats (and places) that they could have (step 5)."""
        if not self.real_optimizers:
            return ()
        self.line.explicit_phase = "optimizer"
        try:
            optimizers = self.real_optimizers, self.fake_optimizers
            with without_engine(self.real_model):
                costs = optimizer_costs(self.real_model, *optimizers, self.line, on_host=on_host)
        except Exception as error:
            kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer in self.real_optimizers}))
            self.notes.append(f"the step of {kinds} cannot be traced; its states count once seen: {error}")
            seen_bytes = self.seen.state_bytes
            return () if seen_bytes is None else (OptimizerCost("as is", seen_bytes, 0, 0.0, {}),)
        self.notes += notes_on(self.fake_optimizers)
        return costs

    def record(self, optimizers: tuple[OptimizerCost, ...], notes: tuple[str, ...]) -> Profile:
        """Return the trace as a record."""
        draft = Draft(self.num_resident, self.num_events, keeps_gradients=self.line.reads.are_late(self.regions))
        return Profile(
            device=self.device_type,
            resident_bytes=self.resident,
            num_events=self.num_events,
            forward_end=self.forward_end,
            backward_start=self.backward_start,
            storages=draft.storages(self.line.entries),
            places=draft.places(self.line.entries),
            saves=tuple(draft.save(save) for save in self.saves),
            regions=tuple(draft.region(region) for region in self.regions),
            optimizers=optimizers,
            num_microbatches=self.seen.num_microbatches,
            seconds=self.seconds,
            after_backward_bytes=self.seen.tail.after_backward_bytes if self.seen.tail else 0,
            carried_bytes=self.seen.tail.carried_bytes if self.seen.tail else 0,
            batch_bytes=self.batch_bytes,
            carries_outputs=self.seen.carries_outputs,
            engine=self.engine,
            num_saves=self.num_saves,
            forward_seconds=self.forward_seconds,
            notes=(*notes, *self.notes, *(self.line.by_rates() if self.hardware is None else ())),
            hardware=self.hardware.name if self.hardware else "",
        )
