"""Chooses a pipeline schedule for stages that are there: what they take is measured, not counted from a shape.

Every rank measures its own stages, tells the others, and makes the same choice of what all of them said; so there is no
rank that decides. What is chosen is what `Runtime` carries out, and its bytes are those of that list of actions.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from packlight.budget import Budget
from packlight.pipeline.choose import Candidate, candidates, fastest, within
from packlight.pipeline.copies import Tier
from packlight.pipeline.runtime import Runtime
from packlight.pipeline.schedule import Schedule, ScheduleError
from packlight.pipeline.simulate import StageCost
from packlight.pipeline.stage import Stage
from packlight.pipeline.whole import whole
from packlight.planner.links import find_link
from packlight.planner.pipelines import record, told_of_link
from packlight.planner.plan import memory_bytes
from packlight.planner.stage_costs import Training, is_compiled, measure, tell, tier_of
from packlight.records import Plan
from packlight.step import Link


@dataclass(frozen=True)
class StagesAnswer:
    """A schedule for stages that are there.

    Attributes:
        training: what was asked.
        costs: of each stage of the pipeline, as measured.
        found: all candidates.
        chosen: the fastest that fits.
        plan: the choice as a record.
        link: the way to the tier; None where nothing may move.
    """

    training: Training
    costs: tuple[StageCost, ...]
    found: Sequence[Candidate]
    chosen: Candidate
    plan: Plan
    link: Link | None

    @property
    def schedule(self) -> Schedule:
        """The schedule, with its messages and copies."""
        return whole(self.chosen.timed, self.chosen.copies)

    def runtime(self, **options: Any) -> Runtime:
        """Return what carries the plan out; call its `step`, and `close` it after the last one."""
        training, tier = self.training, None
        if self.plan.tier and self.link is not None:
            tier = tier_of(torch.device(training.stages[0].device), self.link)
        made = {"loss_fn": training.loss_fn, "tier": tier, **training.options, **options}
        try:
            return Runtime(training.stages, self.schedule, **made)
        except BaseException:
            if tier is not None:
                tier.close()
            raise


def plan_stages(
    training: Training,
    *,
    budget: int | str | Budget,
    host_budget: int | str | None = None,
    disk: str | None = None,
    beside_bytes: int = 0,
) -> StagesAnswer:
    """Choose a schedule, and how many chunks of each rank move to a tier; every rank calls it.

    Args:
        training: the stages, and a batch.
        budget: bytes allowed on each rank's device.
        host_budget: bytes of pinned memory that each rank may use, on a GPU.
        disk: folder that activations may be moved to.
        beside_bytes: of this rank's device, besides parameters, gradients, buffers and what the schedule takes: the
            optimiser's states, the batch, libraries.

    Returns:
        The choice, the same on every rank.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that something does.
        ScheduleError: no schedule runs so many microbatches on such ranks, or on compiled stages.
        ValueError: the budget cannot be read, or no file can be made in the folder.
    """
    first = training.stages[0]
    device, num_ranks = torch.device(first.device), first.group_size
    allowed = Budget.of(budget, total_bytes=memory_bytes(device, None))
    link = find_link(device, host_budget=host_budget, disk=disk)
    costs = measure(training)
    told = tell((_resident_bytes(training.stages) + beside_bytes, link), first)
    links = [link for _, link in told if link is not None]
    tier = None
    if len(links) == num_ranks:
        rates = [(each.out_bytes_per_second, each.in_bytes_per_second) for each in links]
        busy = max(each.busy_seconds_per_byte for each in links)
        tier = Tier(min(out for out, _ in rates), min(back for _, back in rates), busy_seconds_per_byte=busy)
    shape = num_ranks, len(training.stages), training.num_microbatches
    found = list(candidates(shape, costs, resident_bytes=[resident for resident, _ in told], tier=tier))
    capacity = min((_share(each) for each in links), default=None)
    fitting = runnable(found, is_split=not is_compiled(training.stages))
    chosen = fastest(fitting, allowed.device_bytes, capacity)
    plan = record(
        within(fitting, capacity),
        chosen,
        budget_bytes=allowed.device_bytes,
        tier=tier,
        tier_name=links[0].tier if links else "host",
    )
    notes = [
        "bytes and seconds of each stage are measured, with one microbatch; parameters' gradients are counted whole, "
        "the optimiser's step is not; outputs of the last stage are not kept (return_outputs=False)"
    ]
    if tier is not None and chosen.num_moved:
        notes.append(told_of_link(chosen, tier))
    plan = replace(plan, device=device.type, notes=tuple(notes))
    return StagesAnswer(training, costs, found, chosen, plan, link)


def _resident_bytes(stages: Sequence[Stage]) -> int:
    """Return the bytes of parameters, of their gradients, and of buffers."""
    modules = nn.ModuleList([stage.submod for stage in stages])
    parameters = {id(each): each for each in modules.parameters()}.values()
    gradients = sum(_local(each).nbytes for each in parameters if each.requires_grad)
    return gradients + sum(_local(each).nbytes for each in (*parameters, *modules.buffers()))


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _share(link: Link) -> int:
    """Return what a rank may store: ranks of a machine share its disk; of host memory each has its own budget."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if link.tier == "disk" else 1
    return link.capacity_bytes // ranks_here


def runnable(found: Sequence[Candidate], *, is_split: bool) -> list[Candidate]:
    """Return the candidates that stages can run.

    Args:
        found: all of them.
        is_split: whether backward can be split; not that of a compiled stage.

    Raises:
        ScheduleError: there is none.
    """
    made = [each for each in found if is_split or not _splits(each)]
    if not made:
        schedule = found[0].timed.schedule
        raise ScheduleError(
            "a stage is compiled, so that its backward cannot be split, and schedules that do not split it cannot run "
            f"{schedule.num_microbatches} microbatches; compile parts of the stage, or take {schedule.num_ranks} or a "
            "multiple"
        )
    return made


def _splits(candidate: Candidate) -> bool:
    return any(action.kind == "I" for action in candidate.timed.schedule.orders[0])
