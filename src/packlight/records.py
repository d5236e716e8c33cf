"""What passes between the stages: profile -> plan -> apply -> measurement, as plain frozen records.

PyTorch has no record of a training step's memory that can be printed, saved, compared and edited before the step
runs: its profiler writes traces of what already happened. Here every stage of packlight reads and writes the records
of this file and nothing else, so that deciding and doing are separate programs joined by a JSON file, and a saved
record can be read on a machine without torch.

For their size the line of events that a `Profile` holds stands in `step.py`, what happened in a run in
`measurement.py`, what ranks share in `ranks.py`, and how a pipeline's ranks work in `schedules.py`; how records become
JSON, in `serial.py`.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from packlight.budget import format_bytes, format_seconds
from packlight.measurement import Measurement, as_html
from packlight.memory import Memory
from packlight.ranks import Sharded
from packlight.schedules import Pipeline
from packlight.serial import JsonRecord

CATEGORIES = ("parameters", "gradients", "optimizer_states", "activations", "temporaries", "other")
"""What the bytes at a peak are divided into; "other" is buffers, batches and whatever else the script holds."""

CHOICES = ("keep", "recompute", "compress", "offload", "compress+offload")
"""What can be done with a group of storages."""


@dataclass(frozen=True)
class Choice:
    """What is done with one group of storages.

    Attributes:
        group: the path of the block that saves them, or the site that saves them first.
        choice: one of `CHOICES`.
        bytes: what the group holds for backward if it is kept.
        seconds: what the choice adds to a step.
        codec: how it is encoded, where it is.
        sites: all that save the group, where it is no block.
        held_seconds: predicted time from the group's first save to its last use, if it is kept.
        options: what each choice that there is would add to a step by itself, in seconds; waiting for a tier is not
            known by itself.
    """

    group: str
    choice: str
    bytes: int
    seconds: float
    codec: str = ""
    sites: tuple[str, ...] = ()
    held_seconds: float = 0.0
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a choice that nothing would carry out (a plan may have been edited by hand)."""
        if self.choice not in CHOICES:
            raise ValueError(f"the choice for {self.group!r} is {self.choice!r}; wanted one of {', '.join(CHOICES)}")


@dataclass(frozen=True)
class Estimate:
    """What a plan is expected to cost, before it runs.

    Attributes:
        device_peak_bytes: most bytes that tensors occupy on the training device at one moment of a step.
        host_peak_bytes: most bytes in host memory beyond that (0 where nothing is moved there).
        step_seconds: time of a step, from the first forward to the end of the optimiser's step.
        slowdown: `step_seconds` over that of keeping everything with the optimiser as it is.
        plain_peak_bytes: the device peak of keeping everything with the optimiser as it is.
        peak_by_category: `device_peak_bytes` divided by `CATEGORIES`.
        peak_moment: where in the step the peak stands: "forward", "backward" or "optimizer".
    """

    device_peak_bytes: int
    host_peak_bytes: int
    step_seconds: float
    slowdown: float
    plain_peak_bytes: int
    peak_by_category: Mapping[str, int]
    peak_moment: str


@dataclass(frozen=True)
class CurvePoint:
    """What the fastest plan for another budget would take; but for the budget as in `Estimate`."""

    budget_bytes: int
    device_peak_bytes: int
    step_seconds: float
    slowdown: float


@dataclass(frozen=True)
class Plan(JsonRecord):
    """What is chosen where, and what it is expected to cost; it can be printed, saved, compared and edited.

    Attributes:
        device: type of the training device.
        budget_bytes: bytes allowed on the device.
        exact: whether only choices that leave every loss and gradient bit-equal were allowed.
        choices: one for each group that could be chosen for.
        state_formats: the format of each parameter's optimiser state, by the parameter's name.
        smallest_budget_bytes: the least budget that a plan would fit.
        notes: what a reader should know, in sentences.
        tier, folder: where groups are moved to, "host" or "disk" ("" where none is), and the disk's folder.
        window_bytes: most that is on its way to the tier, and again from it.
        out_bytes_per_second, in_bytes_per_second: how fast the tier is taken to be; 0 where nothing is moved.
        uses: sites in the order in which backward asks for what is moved or encoded there.
        hardware: the name of the device that it is made for; "" for the one at hand.
        curve: what other budgets would give, by growing budget; empty where it was not asked for.
        kept: groups outside of recomputed blocks that stay as they are, though more could be done with them.
        num_microbatches: parts that a batch is split into, whose gradients add up.
        releases_gradients: whether each parameter is stepped inside backward, and its gradient freed there.
        pipeline: the schedule of a pipeline, whose stages the choices are for; None for a model on one device.
        sharding: how ranks share the model's states; None where each has them all.
        predicted: what lives over a step; None where that was not worked out (a pipeline, a record of before).
        num_elements: elements of each parameter in `state_formats`; empty in a record of before.
    """

    kind: ClassVar[str] = "plan"

    device: str
    budget_bytes: int
    exact: bool
    choices: tuple[Choice, ...]
    state_formats: Mapping[str, str]
    estimate: Estimate
    smallest_budget_bytes: int
    notes: tuple[str, ...] = ()
    tier: str = ""
    folder: str = ""
    window_bytes: int = 0
    out_bytes_per_second: float = 0.0
    in_bytes_per_second: float = 0.0
    uses: tuple[str, ...] = ()
    hardware: str = ""
    curve: tuple[CurvePoint, ...] = ()
    kept: tuple[Choice, ...] = ()
    releases_gradients: bool = False
    num_microbatches: int = 1
    pipeline: Pipeline | None = None
    sharding: Sharded | None = None
    predicted: Memory | None = None
    num_elements: Mapping[str, int] = field(default_factory=dict)

    def recomputed(self) -> frozenset[str]:
        """Return the paths of the blocks that are recomputed in backward."""
        return frozenset(choice.group for choice in self.choices if choice.choice == "recompute")

    def site_choices(self) -> dict[str, str]:
        """Return the choice by site for all groups that are encoded or moved, as `activations.Engine` reads it."""
        return {
            site: f"{each.choice}:{each.codec}" if each.choice.startswith("compress") else each.choice
            for each in self.choices
            for site in each.sites
        }

    @property
    def changes_nothing(self) -> bool:
        """Whether training goes on as if there were no plan."""
        is_kept = all(choice.choice == "keep" for choice in self.choices)
        is_kept = is_kept and all(chosen in ("fp32", "as is") for chosen in self.state_formats.values())
        is_whole = self.num_microbatches == 1 and self.pipeline is None and self.sharding is None
        return is_kept and is_whole and not self.releases_gradients

    def _slowdown(self) -> str:
        """Say the slowdown and, where a step is expected to be faster than if nothing is changed, why."""
        told = f"{self.estimate.slowdown:.2f}x"
        if round(self.estimate.slowdown, 2) >= 1:
            return told
        if any(chosen not in ("fp32", "as is") for chosen in self.state_formats.values()):
            return f"{told}: states in few bits, as timed here, are stepped faster than others"
        if self.num_microbatches > 1:
            return f"{told}: parts of a batch, timed alone, took less than their share"
        return f"{told}: as fast, to the noise of timing"

    def _states(self) -> str:
        """Say how many parameters, of how many elements, have their optimiser's state in each format."""
        named: dict[str, list[str]] = {}
        for name, chosen in self.state_formats.items():
            named.setdefault(chosen, []).append(name)
        told = []
        for chosen, names in sorted(named.items()):
            num_elements = sum(self.num_elements.get(name, 0) for name in names)
            elements = f" ({num_elements:,} elements)" if num_elements else ""
            told.append(f"{chosen} for {len(names)} parameter{'s' * (len(names) != 1)}{elements}")
        return ", ".join(told) or "none"

    def __str__(self) -> str:
        """Say in a few lines what is chosen, and what it is expected to cost."""
        estimate, recomputed = self.estimate, self.recomputed()
        num_blocks = sum(not choice.sites for choice in self.choices)
        blocks = f"blocks: {len(recomputed)} of {num_blocks} recomputed{_shorten(recomputed, self.choices)}"
        if self.changes_nothing:
            blocks = "nothing is changed: blocks, what they save and states stay as they are"
        freed = "; gradients freed inside backward" if self.releases_gradients else ""
        lines = [
            f"plan for {format_bytes(self.budget_bytes)} on {self.hardware or self.device}{' (exact)' * self.exact}: "
            f"predicted peak {format_bytes(estimate.device_peak_bytes)} "
            f"({format_bytes(estimate.plain_peak_bytes)} if nothing is changed), "
            f"{format_seconds(estimate.step_seconds)} a step ({self._slowdown()})",
            f"  pipeline: {self.pipeline.told(self.tier, self.folder)}" if self.pipeline else f"  {blocks}",
            *[f"  shared: {self.sharding}"] * (self.sharding is not None),
            *self._treated_lines(),
            *[f"  each batch in {self.num_microbatches} microbatches"] * (self.num_microbatches > 1),
            *[f"  optimiser states: {self._states()}{freed}"] * (self.pipeline is None),
            *[f"  in host memory: {format_bytes(estimate.host_peak_bytes)}"] * (estimate.host_peak_bytes > 0),
            f"  at the peak ({estimate.peak_moment}): "
            + ", ".join(f"{name} {format_bytes(size)}" for name, size in estimate.peak_by_category.items() if size),
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _repr_html_(self) -> str:
        """Show in a notebook what is expected, and below it what is chosen."""
        estimate = self.estimate
        rows = {
            "budget": format_bytes(self.budget_bytes),
            "predicted peak": f"{format_bytes(estimate.device_peak_bytes)} in {estimate.peak_moment}",
            "peak if nothing is changed": format_bytes(estimate.plain_peak_bytes),
            "predicted step": f"{format_seconds(estimate.step_seconds)} ({self._slowdown()})",
        }
        return as_html(rows, self)

    def _treated_lines(self) -> list[str]:
        found: dict[str, list[int]] = {}
        moved = f"moved to the {self.tier}{f' in {self.folder}' if self.folder else ''}"
        for choice in self.choices:
            if choice.sites and choice.choice != "keep":
                held = [f"held as {choice.codec}"] * choice.choice.startswith("compress")
                way = " and ".join(held + [moved] * ("offload" in choice.choice))
                found.setdefault(way, []).append(choice.bytes)
        told = ((way, len(sizes), format_bytes(sum(sizes))) for way, sizes in sorted(found.items()))
        return [f"  saved tensors: {num_groups} {way}, {size} before" for way, num_groups, size in told]


def _shorten(recomputed: frozenset[str], choices: tuple[Choice, ...]) -> str:
    names = [choice.group for choice in choices if choice.group in recomputed]
    if not names:
        return ""
    return f": {', '.join(names)}" if len(names) <= 4 else f": {names[0]}, {names[1]}, ... {names[-1]}"


@dataclass(frozen=True)
class Run(JsonRecord):
    """A run under packlight: the plan that was carried out, what was expected, and what happened.

    Attributes:
        script: the command line that was run.
        estimate: of the plan that was carried out, made before its first step.
        first_estimate: made before the script's first step, when the loss outside the model had not been seen.
        measured: what lived over the step in which the measured peak stands; None where none was followed.
    """

    kind: ClassVar[str] = "run"

    script: tuple[str, ...]
    plan: Plan | None
    estimate: Estimate | None
    first_estimate: Estimate | None
    measurement: Measurement
    environment: Mapping[str, Any] = field(default_factory=dict)
    measured: Memory | None = None

    @property
    def predicted(self) -> Memory | None:
        """What was expected to live over a step under the plan that was carried out."""
        return None if self.plan is None else self.plan.predicted

    def __str__(self) -> str:
        """Say what was run, under which plan, and what happened."""
        planned = [str(self.plan)] * (self.plan is not None)
        return "\n".join([f"run of {shlex.join(self.script)}", *planned, str(self.measurement)])

    def _repr_html_(self) -> str:
        """Show in a notebook the plan, and below it what happened."""
        return ("" if self.plan is None else self.plan._repr_html_()) + self.measurement._repr_html_()
