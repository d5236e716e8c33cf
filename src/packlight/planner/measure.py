"""Follows the steps of a training loop from outside: bytes, moments and seconds.

A training loop is the user's own code, so nothing tells where a step begins. The idea: it can be read off three events
that every loop has. A step begins at the first forward with gradients after an optimiser's step; the loss lies between
that forward's end and the moment when a gradient reaches the model's outputs; the step ends with the optimiser's step.

```
1 forward begins     hook on the model       4 gradient at the outputs   tensor hooks
2 forward ends       hook on the model       5 backward ends             told by the caller, where it knows
3 backward begins    told by the caller      6 the optimiser begins, ends   its step hooks
```
The first steps are watched operator by operator (`timeline.py`), but never what a loop does between them: an
evaluation may take other kernels under a dispatch mode. Later steps run at full speed and are timed.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from packlight.measurement import Measurement
from packlight.planner.likeness import state_tensors
from packlight.planner.listen import ModuleHook
from packlight.planner.lived import Lived
from packlight.planner.loop import Seen
from packlight.planner.process import reset_resident_peak, resident_bytes
from packlight.planner.tail import TailWatch
from packlight.planner.tensors import existing_tensors, storage_bytes
from packlight.planner.timeline import Resizes, Timeline, put_under, take_off

NUM_MEASURED_STEPS = 3
MAX_SYNCHRONISED_STEPS = 20
"""On CUDA a step's end has to be waited for to be timed; after so many steps the waiting ends."""


class StepWatch:
    """Watches a model and its optimisers from the first training forward on, until `close`."""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, num_measured: int = NUM_MEASURED_STEPS
    ) -> None:
        """Hook onto the model; the optimisers' steps are told through `attach` or by the caller."""
        first = next((parameter.device.type for parameter in model.parameters()), "cpu")
        self.model, self.optimizers = model, list(optimizers)
        self.line = Timeline(first)
        self.tail, self.lived = TailWatch(self.line), Lived(model, self.optimizers)
        self.num_steps = self.num_microbatches = self.num_backwards = 0
        self.other_bytes = 0
        self._num_measured = num_measured
        self._seconds: list[tuple[float, bool]] = []
        self._num_followed = 0
        self._started: float | None = None
        self._stepped_at: float | None = None
        self._measuring = self._began = False
        self._peak_before_bytes = 0
        self._plan: _PlanPeak = _PlanPeak()
        self._resident_start_bytes = self._resident_before_bytes = 0
        self._hooks = [
            model.register_forward_pre_hook(ModuleHook(model, lambda _args: self.forward_begins())),
            model.register_forward_hook(ModuleHook(model, lambda _args, output: self.forward_ends(output))),
        ]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow an optimiser's steps by its own hooks."""
        self._hooks.append(optimizer.register_step_pre_hook(lambda *_: self.update_begins()))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.update_ends()))

    def forward_begins(self) -> None:
        """Open a step, unless one is open (mark 1)."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        if not self.optimizers and self.num_microbatches:
            self._stepped_at = self._clock()  # without an optimiser a step is a forward and what follows it
        self.end_step()
        if self._started is None:
            self._open_step()
        if self._measuring:
            self.line.explicit_phase = "forward"

    def forward_ends(self, output: object) -> None:
        """Note the live bytes, and watch for the gradient at the outputs (mark 2)."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        self.num_microbatches += 1
        self.line.explicit_phase = None
        if self._measuring:
            self.tail.forward_ends(output)

    def backward_begins(self) -> None:
        """Note what the loss has allocated (mark 3)."""
        if self._measuring:
            self.tail.backward_begins()

    def backward_ends(self) -> None:
        """Note the live bytes (mark 5)."""
        self.num_backwards += 1
        if self._measuring:
            self.tail.backward_ends()

    def update_begins(self) -> None:
        """Name the gradients, and note what was allocated since backward (mark 6)."""
        if self._measuring:
            if self._stepped_at is not None:
                self.resume()  # a second optimiser in the same step
            self.lived.name_gradients()
            self.tail.update_begins()
            self.line.explicit_phase = "optimizer"

    def update_ends(self) -> None:
        """Name the states; the step ends here unless another optimiser follows."""
        if self._measuring:
            self.lived.name_states()
            self.lived.step_ends()
            self.line.explicit_phase = None
            self.pause()
        self._stepped_at = self._clock()

    def plan_begins(self) -> None:
        """Measure the peak apart from the next step on: it runs under another plan."""
        self._plan = _PlanPeak()

    def end_step(self) -> None:
        """Close a step that has stepped, which the next forward would do else."""
        if self._stepped_at is not None:
            self._end_step()

    @property
    def is_measuring(self) -> bool:
        """Whether the present step is followed, storage by storage."""
        return self._measuring

    def step_is_open(self) -> bool:
        """Tell whether a step has begun and its optimiser has not stepped."""
        return self._started is not None and self._stepped_at is None

    def plan_peak_bytes(self) -> int | None:
        """Return the peak under the present plan, in whole steps; None before the first of them."""
        if self._plan.start is None:
            return None
        if self.line.device_type == "cuda":
            return max(self._plan.peak_bytes, torch.cuda.max_memory_allocated())
        now_bytes = self.line.peak(start=self._plan.start)[0] if self._measuring else 0
        return max(self._plan.peak_bytes, now_bytes) or None

    def live_bytes(self) -> dict[str, int]:
        """Return what lives while no line is followed, by category; what is nothing else counts as activations."""
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        live = {
            "parameters": storage_bytes(self.model.parameters()),
            "gradients": storage_bytes(gradients),
            "optimizer_states": self.state_bytes(on_device=True),
            "other": self.other_bytes,
        }
        cuda = self.line.device_type == "cuda"
        all_bytes = torch.cuda.memory_allocated() if cuda else storage_bytes(existing_tensors(self.line.device_type))
        return live | {"activations": max(0, all_bytes - sum(live.values()))}

    def seen(self, gradients: Literal["none", "forward", "step"]) -> Seen:
        """Return what the open step has shown of the loop, `gradients` where it has one backward pass."""
        return Seen(
            tail=self.tail.tail(),
            state_bytes=self.state_bytes(),
            num_microbatches=max(1, self.num_backwards),
            num_forwards=math.ceil(self.num_microbatches / max(1, self.num_backwards)),
            gradients="step" if self.num_backwards > 1 else gradients,
            other_bytes=self.other_bytes + self._unseen_bytes(),
            held_outputs=self.tail.held_outputs,
            carries_outputs=bool(self.tail.living_outputs()),
        )

    def _unseen_bytes(self) -> int:
        """Return what a GPU's allocator has given out and no tensor of Python's holds: libraries' workspaces."""
        if self.line.device_type != "cuda" or not self._measuring:
            return 0
        return max(0, torch.cuda.memory_allocated() - self.line.live_bytes)

    def step_seconds_so_far(self) -> float:
        """Return how long the open step has taken."""
        return 0.0 if self._started is None else (self._clock() or 0.0) - self._started

    def measurement(self, losses: dict[str, tuple[float, ...]] | None = None) -> Measurement:
        """Return what has been measured so far; closed steps and the one that has just stepped."""
        self.end_step()
        (peak_bytes, moment, by_category), _ = self.lived.now()
        cuda = self.line.device_type == "cuda" and self._began
        timed = [seconds for seconds, followed in self._seconds if not followed] or [at for at, _ in self._seconds]
        return Measurement(
            device_peak_bytes=max(self._peak_before_bytes, torch.cuda.max_memory_allocated()) if cuda else peak_bytes,
            host_peak_bytes=0,
            reserved_peak_bytes=torch.cuda.max_memory_reserved() if cuda else None,
            resident_peak_bytes=max(0, self._resident_peak_bytes() - self._resident_start_bytes),
            step_seconds=statistics.median(timed) if timed else None,
            num_steps=self.num_steps,
            num_measured_steps=self.num_steps if cuda else self._num_followed,
            losses=losses or {"first": (), "last": ()},
            peak_by_category={} if cuda else by_category,
            peak_moment="" if cuda else moment,
            state_bytes=self.state_bytes(),
            plan_peak_bytes=self.plan_peak_bytes(),
        )

    def _resident_peak_bytes(self) -> int:
        return max(self._resident_before_bytes, resident_bytes("VmHWM"))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out what is allocated inside, for planning."""
        was_on, cuda = self.pause(), self.line.device_type == "cuda"
        self._resident_before_bytes = self._resident_peak_bytes()
        if cuda:
            peak_bytes = torch.cuda.max_memory_allocated()
            self._peak_before_bytes = max(self._peak_before_bytes, peak_bytes)
            self._plan.peak_bytes = max(self._plan.peak_bytes, peak_bytes if self._plan.start is not None else 0)
        try:
            yield
        finally:
            reset_resident_peak()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            if was_on:
                self.resume()

    def pause(self) -> bool:
        """Take the line off the stack of dispatch modes; returns whether it was on it."""
        return take_off(self.line)

    def resume(self) -> None:
        """Put the line back onto the stack."""
        put_under(self.line)

    def close(self) -> None:
        """Stop watching and take every hook off."""
        self.end_step()
        self._stop_measuring()
        while self._hooks:
            self._hooks.pop().remove()

    def _open_step(self) -> None:
        if not self._began:
            self._began = True
            self._begin()
            self._follow()
        if self._measuring:
            self._meet_others()
            self.lived.step_begins(self.num_steps + 1)
            self.resume()
        if self._plan.start is None:
            self._open_plan()
        self._started = self._clock()

    def _open_plan(self) -> None:
        self._plan.start = self.line.now()
        if self.line.device_type == "cuda":
            self._peak_before_bytes = max(self._peak_before_bytes, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def _begin(self) -> None:
        """Put everything that lives at the head of the line, and watch from here on."""
        self._resident_start_bytes, self._resident_before_bytes = resident_bytes("VmRSS"), 0
        reset_resident_peak()
        if self.line.device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _follow(self) -> None:
        """Begin a line with what is known of what lives."""
        self.lived.follow(self.line)
        self._measuring = True
        self._resizes = Resizes(self.line)

    def measure_next(self, num_steps: int = 1) -> None:
        """Close a step that has stepped, and follow the next ones."""
        self.end_step()
        self.measure_again(num_steps)

    def measure_again(self, num_steps: int = 1) -> None:
        """Follow the next steps too, storage by storage."""
        if not self._began:
            return
        self._num_measured = max(self._num_measured, self.num_steps + num_steps)
        if not self._measuring:
            self.line = Timeline(self.line.device_type)
            self.tail = TailWatch(self.line)
            self._plan.start = None if self._plan.start is None else 0
            self._follow()

    def _meet_others(self) -> None:
        """Add what was made between steps (a batch, a data set), while nothing was followed."""
        before_bytes = self.line.live_bytes
        for tensor in existing_tensors(self.line.device_type):
            if self.line.index(tensor) is None:
                self.lived.add_other(tensor)
        self.other_bytes += self.line.live_bytes - before_bytes

    def _end_step(self) -> None:
        if self._started is not None and self._stepped_at is not None:
            self._seconds.append((self._stepped_at - self._started, self._measuring))
        self._started = self._stepped_at = None
        self.num_steps += 1
        self._num_followed += self._measuring
        self.num_microbatches = self.num_backwards = 0
        if self.num_steps >= (1 if self.line.device_type == "cuda" else self._num_measured):
            self._stop_measuring()

    def _stop_measuring(self) -> None:
        if self._measuring:
            self._measuring = False
            self._resizes.close()
            self.pause()
            self.lived.close()
            if self._plan.start is not None:
                self._plan.peak_bytes = max(self._plan.peak_bytes, self.line.peak(start=self._plan.start)[0])
            self.line.close()

    def state_bytes(self, *, on_device: bool = False) -> int:
        """Return the bytes of the optimisers' states, each storage once; of those on the device, or of all."""
        held = [tensor for each in self.optimizers for tensor in state_tensors(each)]
        here = [tensor for tensor in held if not on_device or tensor.device.type == self.line.device_type]
        return storage_bytes(here)

    def _clock(self) -> float:
        if self.line.device_type == "cuda" and self.num_steps < MAX_SYNCHRONISED_STEPS:
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass
class _PlanPeak:
    """The peak under one plan: the event on the present line from which it counts, and what came before that line."""

    start: int | None = None
    peak_bytes: int = 0
