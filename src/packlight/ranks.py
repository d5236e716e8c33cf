"""What a plan says of several ranks that share a model's states, as records: what each holds, what they send.

Sizes are of the rank that holds most. Formulas are in `sharding/`, the choice is made in `planner/world.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from packlight.budget import format_bytes

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
"""What parameters may be cast to where they are used, by the name that trainers give it, and torch's name of it."""


@dataclass(frozen=True)
class ShardingRow:
    """A way to share a model's states among ranks, and what it would take.

    Attributes:
        name: "DDP", "ZeRO-0" to "ZeRO-3", or "FSDP2", with "kept" where parameters stay gathered until backward, and
            "host" where shares are in host memory.
        parameter_bytes: of parameters, with the fp32 copies that are stepped in their place.
        gradient_bytes: of gradients when the optimiser steps.
        state_bytes: of the optimiser's states, by format.
        buffer_bytes: of buffers that the engine keeps, or has for backward.
        plain_peak_bytes: the peak where nothing else is changed.
        sent_bytes: what a rank sends in a step.
        communication_seconds: what that takes by itself, and
        exposed_seconds: what of it compute does not hide.
        step_seconds: of the fastest plan that fits; None where none does.
        is_chosen: whether the plan takes it.
        host_bytes: of parameters and gradients in host memory; states are there, too, where it is more than 0.
    """

    name: str
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: Mapping[str, int]
    buffer_bytes: int
    plain_peak_bytes: int
    sent_bytes: int
    communication_seconds: float
    exposed_seconds: float
    step_seconds: float | None
    is_chosen: bool = False
    host_bytes: int = 0


@dataclass(frozen=True)
class Sharded:
    """How a plan shares a model's states.

    Attributes:
        engine: "ddp", "zero" (DeepSpeed) or "fsdp" (torch's `fully_shard`).
        stage: of ZeRO, or what it comes to.
        num_ranks: of the data-parallel group.
        units: paths of the modules that `fully_shard` is to be applied to, before the root.
        keeps: whether they stay gathered from forward until backward (`reshard_after_forward=False`).
        offloads: whether shares are in host memory (`CPUOffloadPolicy`).
        precision: of `PRECISIONS`, what parameters are cast to where they are used; "": nothing.
        options: of DeepSpeed's `zero_optimization`, where the engine is "zero".
        dtype: of the parameters.
        link_bytes_per_second: what a rank sends to the next, in one direction.
        binds: what stands against a faster step, in a sentence.
        rows: all ways that were weighed, the least communication first.
    """

    engine: str
    stage: int
    num_ranks: int
    units: tuple[str, ...] = ()
    keeps: bool = False
    offloads: bool = False
    precision: str = ""
    options: Mapping[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    link_bytes_per_second: float = 0.0
    binds: str = ""
    rows: tuple[ShardingRow, ...] = ()

    def __str__(self) -> str:
        """Say in a line how states are shared, and what binds."""
        chosen = next((row for row in self.rows if row.is_chosen), None)
        name = chosen.name if chosen else f"{self.engine}, stage {self.stage}"
        sent = f", {format_bytes(chosen.sent_bytes)} sent by each in a step" if chosen else ""
        return f"{name} on {self.num_ranks} rank{'s' * (self.num_ranks != 1)}{sent}; {self.binds}"
