"""What happened in a run, as a record that says itself what was expected.

torch's counters are numbers without a plan: a peak of 9 GiB tells neither whether that was expected, nor of how many
steps it is. Here each figure is told beside its prediction, and what surprises a reader with its reason.
"""

import html
from collections.abc import Mapping
from dataclasses import dataclass

from packlight.budget import format_bytes, format_seconds

RESIDENT = "beyond what was resident before step 1, so without parameters and memory that is used again"
"""What a resident peak is, where that is below the tensors' peak."""


def as_html(rows: Mapping[str, str], record: object) -> str:
    """Return what a notebook shows of a record: what a reader looks for first, and below it what it says."""
    cells = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table><pre>{html.escape(str(record))}</pre>"


def _beside(value: str, predicted: str) -> str:
    return value if predicted == "-" else f"{value} (predicted {predicted})"


@dataclass(frozen=True)
class Measurement:
    """What happened in the run.

    Attributes:
        device_peak_bytes: on CUDA the allocator's peak, on the CPU the peak of live tensor bytes in the measured steps.
        host_peak_bytes: bytes in host memory beyond the device's (0 where nothing is moved there).
        reserved_peak_bytes: on CUDA what the allocator had reserved; None on the CPU.
        resident_peak_bytes: the process's peak resident size less its resident size before the first step.
        step_seconds: median time of the steps that were not watched op by op; None where there was none.
        num_steps: optimiser steps that the script took.
        num_measured_steps: how many of them the peak was taken over.
        losses: the values that backward was called on, summed over a step's microbatches: first and last ten.
        peak_by_category: `device_peak_bytes` divided by `CATEGORIES` (empty on CUDA).
        peak_moment: where in the step the peak stood.
        state_bytes: bytes of the optimiser's states at the end.
        plan_peak_bytes: the device peak in the measured steps that ran under the plan in force at the end, from their
            first forward on; None where no whole step was measured under it.
        tier_peak_bytes: most that lay on the tier under that plan.
        out_bytes_per_second, in_bytes_per_second: how fast the tier was while something was on its way; 0 where
            nothing was.
        predicted_peak_bytes, predicted_step_seconds: what was expected under that plan; None where there is none.
        notes: what a reader should know, in sentences.
    """

    device_peak_bytes: int
    host_peak_bytes: int
    reserved_peak_bytes: int | None
    resident_peak_bytes: int
    step_seconds: float | None
    num_steps: int
    num_measured_steps: int
    losses: Mapping[str, tuple[float, ...]]
    peak_by_category: Mapping[str, int]
    peak_moment: str
    state_bytes: int
    plan_peak_bytes: int | None = None
    tier_peak_bytes: int = 0
    out_bytes_per_second: float = 0.0
    in_bytes_per_second: float = 0.0
    predicted_peak_bytes: int | None = None
    predicted_step_seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_resident_below(self) -> bool:
        """Whether the resident peak is below what tensors took of the same memory, which looks wrong."""
        return self.reserved_peak_bytes is None and self.resident_peak_bytes < self.device_peak_bytes

    def told_peak(self) -> str:
        """Say the peak beside its prediction."""
        told, under_plan_bytes = format_bytes(self.device_peak_bytes), self.plan_peak_bytes
        if under_plan_bytes is not None and under_plan_bytes < self.device_peak_bytes:  # other plans came before it
            told += f", {format_bytes(under_plan_bytes)} under the final plan"
        return _beside(told, "-" if self.predicted_peak_bytes is None else format_bytes(self.predicted_peak_bytes))

    def told_step(self, per: str = "") -> str:
        """Say the step time, and what it is per, beside its prediction."""
        return _beside(f"{format_seconds(self.step_seconds)}{per}", format_seconds(self.predicted_step_seconds))

    def told_resident(self) -> str:
        """Say the resident peak and, where it is below what tensors took of the same memory, why."""
        return format_bytes(self.resident_peak_bytes) + f" ({RESIDENT})" * self.is_resident_below

    def told_loss(self) -> str:
        """Say the first loss and the last; nothing where none was seen."""
        ends = [values for values in (self.losses.get("first"), self.losses.get("last")) if values]
        return f"{ends[0][0]:.6g} at first, {ends[-1][-1]:.6g} at last" if ends else ""

    def told_excess(self, budget_bytes: int | None) -> str:
        """Say by how much the peak is above a budget; nothing where it is not, or there is none."""
        excess_bytes = 0 if budget_bytes is None else self.device_peak_bytes - budget_bytes
        return f"; ABOVE THE BUDGET by {format_bytes(excess_bytes)}" if excess_bytes > 0 else ""

    def __str__(self) -> str:
        """Say in a few lines what happened, beside what was expected."""
        divided = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.peak_by_category.items() if size)
        memory = {"resident peak": self.told_resident(), "optimiser states": format_bytes(self.state_bytes)}
        if self.reserved_peak_bytes is not None:
            memory["reserved peak"] = format_bytes(self.reserved_peak_bytes)
        if self.host_peak_bytes:
            memory["in host memory"] = format_bytes(self.host_peak_bytes)
        steps = f"{self.num_measured_steps} of {self.num_steps} steps"
        lines = [
            f"measured: peak {self.told_peak()} in {steps}, {self.told_step(' a step')}",
            *[f"  at the peak ({self.peak_moment}): {divided}"] * bool(divided),
            "  " + ", ".join(f"{name} {size}" for name, size in memory.items()),
            *[f"  loss: {self.told_loss()}"] * bool(self.told_loss()),
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        """Show in a notebook what happened."""
        rows = {"peak": self.told_peak(), "step": self.told_step(), "loss": self.told_loss() or "-"}
        return as_html(rows, self)
