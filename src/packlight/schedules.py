"""What a plan says of a pipeline, as records: how its ranks work, what was weighed, and how a page draws it.

Schedules themselves are made in `pipeline/schedule.py`, and chosen in `planner/pipelines.py` and `planner/staged.py`.
"""

from dataclasses import dataclass

from packlight.budget import format_bytes


@dataclass(frozen=True)
class Pipeline:
    """How microbatches go through the ranks of a pipeline.

    Attributes:
        schedule: the name of the rule that orders each rank's actions.
        num_ranks, num_chunks, num_microbatches: ranks, stages of each, microbatches of a step.
        num_moved: chunks of each rank whose microbatches go to the plan's tier, from the first on.
        bubble: share of the step in which the busiest rank has nothing to do.
        peaks_bytes, hosts_bytes: most on each rank's device, and on its tier.
        orders: what each rank does, as `Runtime` carries it out: "0F0 0SEND_F0 ..." (stage, action, microbatch).
    """

    schedule: str
    num_ranks: int
    num_chunks: int
    num_microbatches: int
    num_moved: int
    bubble: float
    peaks_bytes: tuple[int, ...]
    hosts_bytes: tuple[int, ...]
    orders: tuple[str, ...] = ()

    def told(self, tier: str, folder: str = "") -> str:
        """Say in a line how the ranks work, and what is on their tier: the name of one, and its folder."""
        at = f"the {tier}{f' in {folder}' if folder else ''}, up to {format_bytes(max(self.hosts_bytes))} of a rank"
        moved = f", {self.num_moved} of {self.num_chunks} chunks of each rank moved to {at}" * bool(self.num_moved)
        ranks = f"{self.num_ranks} rank{'s' * (self.num_ranks != 1)}"
        chunks = f"{self.num_chunks} chunk{'s' * (self.num_chunks != 1)}"
        microbatches = f"{self.num_microbatches} microbatch{'es' * (self.num_microbatches != 1)}"
        return f"{self.schedule} on {ranks} with {chunks}, {microbatches}{moved}; bubble {self.bubble:.1%}"


@dataclass(frozen=True)
class PipelineRow:
    """A schedule that was weighed, and what it would take.

    Attributes:
        name: of the schedule, with the chunks that move.
        peak_bytes, host_bytes: most on the device of a rank, and of its host's memory.
        bubble: share of the step in which the busiest rank has nothing to do.
        step_seconds, tokens_per_second: of the whole pipeline.
        is_chosen: whether the plan takes it.
    """

    name: str
    peak_bytes: int
    host_bytes: int
    bubble: float
    step_seconds: float
    tokens_per_second: float
    is_chosen: bool


@dataclass(frozen=True)
class Bar:
    """What one lane of a rank does for a while, as a page draws it.

    Attributes:
        rank: the rank.
        lane: "compute", "out" (copies to the host) or "back".
        kind: "F", "I", "W" or "B" for compute; "OFFLOAD" or "RELOAD".
        stage, microbatch: what it is done for.
        start, end: in seconds from the step's begin.
    """

    rank: int
    lane: str
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float
