"""What is asked of a session, for which ranks, and how a session ends a script.

A plan is made in the middle of somebody else's program, many calls deep, so whatever is wrong there has to travel up
through code that may catch errors. `SessionStop` is therefore no `Exception`, like `SystemExit`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from packlight.budget import Budget, parse_bytes
from packlight.planner.known_hardware import Hardware, named
from packlight.planner.links import find_link, host_memory_bytes, unused
from packlight.ranks import PRECISIONS
from packlight.records import Plan
from packlight.step import Link

ENGINES = ("ddp", "zero", "fsdp")

# An assumption: 10 Gb/s.
UNKNOWN_LINK_BYTES_PER_SECOND = 1.25e9
"""Of ranks on hardware that is at hand, whose network nobody has named."""


class SessionStop(BaseException):
    """Ends a script from inside; not an `Exception`, so that the script's own handlers let it through."""

    def __init__(self, message: str, *, exit_status: int, smallest_bytes: int | None = None) -> None:
        """Keep the exit status, and the smallest budget that fits where that is the reason."""
        super().__init__(message)
        self.exit_status = exit_status
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True)
class World:
    """The ranks that a plan is for.

    Attributes:
        num_ranks: each has the batch that is given, and a share of the states.
        engine: one of `ENGINES`; None: whichever is fastest.
        link_bytes_per_second: what a rank sends to the next; None: the hardware's, or 10 Gb/s.
        precision: "bf16" or "fp16": fp32 parameters are used in 16 bits, and stepped in fp32, which FSDP2 and DeepSpeed
            do; None: they are used as they are.
    """

    num_ranks: int
    engine: str | None = None
    link_bytes_per_second: float | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be planned for."""
        if self.num_ranks < 1:
            raise ValueError(f"world {self.num_ranks} came; wanted the number of ranks, 1 or more")
        if self.engine is not None and self.engine not in ENGINES:
            raise ValueError(f"engine {self.engine!r} came; wanted one of {', '.join(ENGINES)}")
        if self.link_bytes_per_second is not None and self.link_bytes_per_second <= 0:
            raise ValueError(f"a link of {self.link_bytes_per_second} bytes a second came; wanted more than 0")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} came; wanted one of {', '.join(PRECISIONS)}, or none")
        if self.precision is not None and self.engine == "ddp":
            raise ValueError("DDP has no precision of its own; leave it out, and use autocast in the script")

    @property
    def param_dtype(self) -> torch.dtype | None:
        """Return the dtype in which parameters are used; None: their own."""
        return None if self.precision is None else getattr(torch, PRECISIONS[self.precision])

    def link(self, hardware: Hardware | None) -> float:
        """Return what a rank sends to the next, in bytes a second."""
        if self.link_bytes_per_second is not None:
            return self.link_bytes_per_second
        return UNKNOWN_LINK_BYTES_PER_SECOND if hardware is None else hardware.link_bytes_per_second(self.num_ranks)


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        budget: bytes allowed on the device; None: measure the script as it is and change nothing.
        exact: only choices that leave every loss and gradient bit-equal.
        plan: a plan to carry out as it is, instead of making one.
        stop_before_step: stop when the first plan is made.
        host_budget: bytes allowed in host memory.
        disk: folder of the disk tier.
        tell: called with each plan that is made, and a title for it.
        world: the ranks that are planned for, where the script is stopped before its first step; None: this process.
        release_gradients: parameters may be stepped inside backward, and their gradients freed there.
        num_curve_points: budgets for which the step time is told beside the plan.
        hardware: the name of the device to plan for, where the script is stopped before its first step.
    """

    budget: int | str | None
    exact: bool = False
    plan: Plan | None = None
    stop_before_step: bool = False
    host_budget: int | str | None = None
    disk: str | None = None
    tell: Callable[[Plan, str], None] = lambda plan, title: print(f"{title}{plan}")
    hardware: str | None = None
    num_curve_points: int = 0
    release_gradients: bool = False
    world: World | None = None

    def check(self, plan: Plan) -> None:
        """Refuse a given plan that the script would not run as it says.

        Raises:
            SessionStop: it expects more than is allowed, or another loop.
        """
        if plan.pipeline is not None:
            raise SessionStop("the plan is for the stages of a pipeline, not for one model", exit_status=2)
        if self.host_budget is not None and plan.estimate.host_peak_bytes > parse_bytes(
            self.host_budget, total_bytes=host_memory_bytes()
        ):
            raise SessionStop("the plan takes more host memory than its budget; plan again", exit_status=3)
        if plan.num_microbatches > 1:
            raise SessionStop(
                f"the plan is for batches in {plan.num_microbatches} parts, and a script splits its batches itself; "
                "use packlight.apply and handle.microbatches in it, or plan without max_microbatches",
                exit_status=2,
            )
        if plan.estimate.device_peak_bytes > Budget.of(self.budget or plan.budget_bytes).device_bytes:
            raise SessionStop("the plan expects a peak above the budget; plan again", exit_status=3)

    def link(self, device: torch.device) -> Link | None:
        """Return the way to the tier that a plan may use."""
        return find_link(device, host_budget=self.host_budget, disk=self.disk, known=named(self.hardware))

    def unused(self, device: torch.device) -> tuple[str, ...]:
        """Say in sentences which tiers were allowed and are left out."""
        return unused(device, host_budget=self.host_budget, disk=self.disk, known=named(self.hardware))
