"""Chooses a pipeline schedule for stages that are there: what they take is measured, not counted from a shape.

Every rank measures its own stages, tells the others, and makes the same choice of what all of them said; so there is no
rank that decides. What is chosen is what `Runtime` carries out, and its bytes are those of that list of actions.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from packlight.budget import Budget, BudgetError
from packlight.pipeline.choose import Candidate, candidates, fastest, within
from packlight.pipeline.copies import Tier
from packlight.pipeline.runtime import Runtime, told, too_few_rows
from packlight.pipeline.schedule import Schedule, ScheduleError, check_positive
from packlight.pipeline.simulate import StageCost
from packlight.pipeline.stage import Stage, cannot_split
from packlight.pipeline.whole import whole
from packlight.planner.links import find_link, unused
from packlight.planner.pipelines import plain_of, record, told_of_link
from packlight.planner.plan import memory_bytes
from packlight.planner.stage_costs import Training, measure, tier_of
from packlight.records import Plan
from packlight.step import Link

_Here = tuple[int, int, Link | None]
"""Of a rank: the bytes allowed, those that are there anyway, and the way to the tier."""


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
        ScheduleError: no schedule runs so many microbatches on such ranks, or on stages whose backward is one piece.
        ValueError: on any rank: the budget cannot be read, no file can be made in the folder, there are more
            microbatches than rows in the batch, or parameters are stepped inside backward.
    """
    if not training.stages:
        raise ScheduleError("no stage came; wanted those of this rank")
    check_positive(training.stages[0].group_size, len(training.stages), training.num_microbatches)
    first = training.stages[0]
    device, num_ranks = torch.device(first.device), first.group_size

    def here() -> _Here:
        problem = _too_few_rows(training)
        if problem:
            raise ValueError(problem)
        allowed = Budget.of(budget, total_bytes=memory_bytes(device, None))
        resident = _resident_bytes(training.stages) + beside_bytes
        return allowed.device_bytes, resident, find_link(device, host_budget=host_budget, disk=disk)

    ranks = _agreed(here, first)
    link, budget_bytes = ranks[first.group_rank][2], min(allowed for allowed, _, _ in ranks)
    costs = measure(training, link)
    links = [link for _, _, link in ranks if link is not None]
    tier = _tier(links) if len(links) == num_ranks else None
    shape = num_ranks, len(training.stages), training.num_microbatches
    found = list(candidates(shape, costs, resident_bytes=[resident for _, resident, _ in ranks], tier=tier))
    capacity = min((_share(each) for each in links), default=None)
    reasons = itertools.chain(*told([cannot_split(stage) for stage in training.stages], first))
    said = unused(device, host_budget=host_budget, disk=disk)
    fitting = runnable(found, reason=next(filter(None, reasons), None))
    try:
        chosen = fastest(fitting, budget_bytes, capacity)
    except BudgetError as error:
        way = "host_budget=..." if device.type == "cuda" else "disk=..."
        more = [*said, f"{way} would let activations move"] if link is None else []
        message = "; ".join([str(error), *more])
        raise BudgetError(message, smallest_bytes=error.smallest_bytes) from None
    plan = record(
        within(fitting, capacity),
        chosen,
        budget_bytes=budget_bytes,
        tier=tier,
        tier_name=links[0].tier if links else "host",
        folder=link.folder if link is not None else "",
    )
    notes = _notes(ranks, plain_of(found), said)
    if tier is not None and chosen.num_moved:
        notes.append(told_of_link(chosen, tier))
    plan = replace(plan, device=device.type, notes=tuple(notes))
    return StagesAnswer(training, costs, found, chosen, plan, link)


def _notes(ranks: Sequence[_Here], plain: Candidate, unused_said: Sequence[str]) -> list[str]:
    """Say what the numbers rest on, and what ranks came with that others did not."""
    notes = [
        "bytes and seconds of each stage are measured, with one microbatch; parameters' gradients are counted whole, "
        "the optimiser's step is not; outputs of the last stage are not kept (return_outputs=False)",
        "messages are in the order that measured seconds give, so another run's peak may be some messages away; "
        f"slowdown and what nothing changed would take are those of {plain.name}",
        *unused_said,
    ]
    if len({allowed for allowed, _, _ in ranks}) > 1:
        notes.append("ranks came with different budgets: the smallest counts")
    without = [rank for rank, (_, _, link) in enumerate(ranks) if link is None]
    if 0 < len(without) < len(ranks):
        notes.append(f"nothing moves, as ranks {without} came without a tier: pass host_budget or disk on every rank")
    return notes


def _tier(links: Sequence[Link]) -> Tier:
    """Return the way to the tier that every rank has: as fast as the slowest."""
    return Tier(
        min(each.out_bytes_per_second for each in links),
        min(each.in_bytes_per_second for each in links),
        busy_seconds_per_byte=max(each.busy_seconds_per_byte for each in links),
    )


def _too_few_rows(training: Training) -> str:
    """Tell what is wrong where this rank has fewer rows than microbatches; the user's own splits are theirs."""
    given: list[Any] = [training.target]
    given += [] if training.options.get("args_chunk_spec") else training.args
    given += [] if training.options.get("kwargs_chunk_spec") else training.kwargs.values()
    return too_few_rows(given, training.num_microbatches)


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


def _agreed(make: Callable[[], _Here], stage: Stage) -> list[_Here]:
    """Return what every rank makes; where one cannot, its error is raised on all, as they would wait for it."""
    mine: _Here | None = None
    problem: ValueError | None = None
    try:
        mine = make()
    except ValueError as error:
        problem = error
    found = told((mine, str(problem or "")), stage)
    for rank, (_, said) in enumerate(found):
        if said:
            raise problem or ValueError(f"rank {rank}: {said}")
    return [each for each, _ in found]


def runnable(found: Sequence[Candidate], *, reason: str | None) -> list[Candidate]:
    """Return the candidates that stages can run.

    Args:
        found: all of them.
        reason: why the backward of a stage cannot be split; None if it can.

    Raises:
        ScheduleError: there is none.
    """
    made = [each for each in found if reason is None or not _splits(each)]
    if not made:
        schedule = found[0].timed.schedule
        raise ScheduleError(
            f"a stage is {reason}: its backward cannot be split, and schedules that do not split it cannot run "
            f"{schedule.num_microbatches} microbatches; take {schedule.num_ranks} or a multiple"
        )
    return made


def _splits(candidate: Candidate) -> bool:
    return any(action.kind == "I" for action in candidate.timed.schedule.orders[0])
