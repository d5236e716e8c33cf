"""Chooses a pipeline schedule for a model by its shape: what `packlight pipeline` prints, and a plan that says it.

A pipeline's schedule is chosen before the model is on any rank. The shape of a transformer gives bytes and operations
of each stage (`pipeline/shapes.py`), a named device or the user gives the rates, and every schedule is simulated with
every number of its chunks moved to the host (`pipeline/choose.py`).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from packlight.budget import Budget, BudgetError, format_bytes
from packlight.pipeline.choose import Candidate, candidates, fastest, frontier, within
from packlight.pipeline.copies import Tier
from packlight.pipeline.schedule import ScheduleError, check_positive
from packlight.pipeline.shapes import Rates as RankRates
from packlight.pipeline.shapes import Shape, layers_of, parameters_of, shape_named, stage_costs
from packlight.pipeline.simulate import StageCost
from packlight.pipeline.whole import whole, written
from packlight.planner.known_hardware import KNOWN, named
from packlight.records import Choice, Estimate, Plan
from packlight.schedules import Bar, Pipeline, PipelineRow

STATE_BYTES = 16
"""Of a parameter in mixed precision with AdamW: 2 and 2 for itself and its gradient in 16 bits, 12 for an fp32 copy and
two moments (Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 3.1)."""

MOST_FLOPS, MOST_K, MOST_TOKENS = 1e21, 1e6, 2**31
"""Beyond what any device does; they keep numbers within what arrays hold."""


@dataclass(frozen=True)
class PipelineQuestion:
    """What a pipeline is to do, and on what.

    Attributes:
        model: the name of a shape.
        num_ranks, num_chunks, num_microbatches: ranks, stages of each, and microbatches of a step.
        sequence_length, microbatch_size: tokens of a sequence, sequences of a microbatch.
        hardware: the name of each rank's device; None where `k` and `flops_per_second` say all.
        k: time to move a layer's activations out and back over that of its forward and backward; None: by the device.
        flops_per_second: that a rank reaches; None: by the device.
        recompute: whether norms, activations and dropout are computed again in backward.
        state_bytes: that a rank holds for each parameter.
    """

    model: str
    num_ranks: int
    num_chunks: int
    num_microbatches: int
    sequence_length: int
    microbatch_size: int = 1
    hardware: str | None = None
    k: float | None = None
    flops_per_second: float | None = None
    recompute: bool = True
    state_bytes: int = STATE_BYTES

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all microbatches."""
        return self.num_microbatches * self.microbatch_size * self.sequence_length


@dataclass(frozen=True)
class PipelineAnswer:
    """What was found.

    Attributes:
        question: what was asked.
        found: all candidates.
        chosen: the fastest that fits.
        plan: the choice as a record.
    """

    question: PipelineQuestion
    found: Sequence[Candidate]
    chosen: Candidate
    plan: Plan

    def rows(self, *, every: bool = False) -> list[PipelineRow]:
        """Return candidates for a table: those that none beats in time and peak at once, and schedules' plain forms.

        Args:
            every: return all of them.
        """
        shown = [*self.found] if every else [*frontier(self.found), *self._plain_forms(), self.chosen]
        unique = {each.name: each for each in shown}
        by_peak = sorted(unique.values(), key=lambda each: (-each.peak_bytes, each.seconds))
        return [self._row(each) for each in by_peak]

    def _plain_forms(self) -> list[Candidate]:
        known = {"1F1B", "1F1B-I", "GIS", "GIS-H", "PO"}
        return [each for each in self.found if not each.num_moved and each.timed.schedule.name in known]

    def _row(self, each: Candidate) -> PipelineRow:
        return PipelineRow(
            name=each.name,
            peak_bytes=each.peak_bytes,
            host_bytes=each.host_bytes,
            bubble=each.timed.bubble,
            step_seconds=each.seconds,
            tokens_per_second=self.question.tokens_per_step / each.seconds,
            is_chosen=each is self.chosen,
        )

    def bars(self) -> list[Bar]:
        """Return what each rank does when under the choice, for a drawing."""
        timed, found = self.chosen.timed, list[Bar]()
        for rank, order in enumerate(timed.schedule.orders):
            spans = zip(order, timed.starts[rank], timed.ends[rank], strict=True)
            found += [Bar(rank, "compute", at.kind, at.stage, at.microbatch, start, end) for at, start, end in spans]
            copies = self.chosen.copies[rank]
            for lane, kind, times in (("out", "OFFLOAD", copies.out), ("back", "RELOAD", copies.back)):
                found += [Bar(rank, lane, kind, *key, start, end) for key, (start, end) in times.items()]
        return found


def plan_pipeline(
    question: PipelineQuestion, *, budget: int | str | Budget, host_budget: int | str | None = None
) -> PipelineAnswer:
    """Choose a schedule, and how many chunks of each rank move to the host.

    Args:
        question: the model, the ranks and their rates.
        budget: bytes allowed on each rank's device.
        host_budget: bytes of host memory that each rank may use; None for no bound.

    Returns:
        The choice and what it was chosen among.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that something does.
        ScheduleError: no schedule runs so many microbatches on such ranks, or there are more stages than layers.
        ValueError: a name is not known, or neither the hardware nor `k` tells how fast copies are.
    """
    shape, known = shape_named(question.model), named(question.hardware)
    share_of = known.device_bytes if known and isinstance(budget, str) and "%" in budget else None
    wanted = Budget.of(budget, total_bytes=share_of)
    allowed = Budget(min(wanted.device_bytes, known.device_bytes)) if known else wanted
    host_bytes = None if host_budget is None else Budget.of(host_budget).device_bytes
    rates = _rates(question)
    _check(question, shape)
    cost = functools.partial(
        stage_costs,
        rates=rates,
        sequence_length=question.sequence_length,
        microbatch_size=question.microbatch_size,
        recompute=question.recompute,
    )
    costs = cost(shape, question.num_ranks * question.num_chunks)
    _, layer, _ = cost(replace(shape, num_layers=3), 3)  # the middle one has neither embedding nor head
    tier = _tier(question, layer)
    resident = [question.state_bytes * count for count in parameters_of(shape, question.num_ranks, question.num_chunks)]
    numbers = question.num_ranks, question.num_chunks, question.num_microbatches
    found = list(candidates(numbers, costs, resident_bytes=resident, tier=tier))
    try:
        chosen = fastest(found, allowed.device_bytes, host_bytes)
    except BudgetError as error:
        if known is not None and (error.smallest_bytes or 0) > known.device_bytes:
            told = f"{error}; {known.name} has {format_bytes(known.device_bytes)}"
            raise BudgetError(told, smallest_bytes=error.smallest_bytes) from None
        raise
    notes = _notes(question, shape, found, chosen, k=_k_of(layer, tier), tier=tier)
    if known is not None and wanted.device_bytes > known.device_bytes:
        notes.append(
            f"the budget is more than the {format_bytes(known.device_bytes)} that {known.name} has: these count"
        )
    plan = record(within(found, host_bytes), chosen, budget_bytes=allowed.device_bytes, tier=tier)
    device, hardware = ("cuda", question.hardware) if question.hardware else (plan.device, "")
    plan = replace(plan, device=device, hardware=hardware, notes=tuple(notes))
    return PipelineAnswer(question, found, chosen, plan)


def _check(question: PipelineQuestion, shape: Shape) -> None:
    """Refuse what no schedule can be made of, before a product of two numbers hides which of them was meant."""
    check_positive(question.num_ranks, question.num_chunks, question.num_microbatches)
    num_stages = question.num_ranks * question.num_chunks
    if num_stages > shape.num_layers:
        most = shape.num_layers // question.num_ranks
        wanted = f"{most} chunks a rank" if most else f"{shape.num_layers} ranks"
        raise ScheduleError(
            f"{num_stages} stages came for the {shape.num_layers} layers of {shape.name}; wanted at most {wanted}"
        )
    if question.sequence_length * question.microbatch_size > MOST_TOKENS:
        raise ValueError(f"{question.sequence_length} tokens came; wanted at most {MOST_TOKENS} in a microbatch")
    if question.state_bytes < 0:
        raise ValueError(f"{question.state_bytes} bytes of a parameter came; wanted 0 or more")


def _rates(question: PipelineQuestion) -> RankRates:
    known = named(question.hardware)
    if known is None and (question.k is None or question.flops_per_second is None):
        missing = "k (--k)" if question.k is None else "flops_per_second (--tflops)"
        raise ValueError(
            f"{missing} is not known: without hardware both k (--k: time to move a layer's activations out and back "
            "over that of its forward and backward) and a rank's operations a second (--tflops) are wanted; or name "
            f"hardware (--hardware), one of {', '.join(KNOWN)}"
        )
    if question.k is not None and not 0 < question.k < MOST_K:
        raise ValueError(
            f"k={question.k} came; wanted more than 0 (1 or less: all can move beside compute) and less than {MOST_K:g}"
        )
    flops = question.flops_per_second
    if flops is None:
        assert known is not None
        flops = max(known.rates().flops_per_second[precision] for precision in ("bf16", "fp16"))
    if not 0 < flops < MOST_FLOPS:
        raise ValueError(f"a rate of {flops} operations a second came; wanted more than 0 and less than {MOST_FLOPS:g}")
    return RankRates(flops, known.host_bytes_per_second if known else float("inf"))


def _tier(question: PipelineQuestion, layer: StageCost) -> Tier:
    """Return the way to the host: as fast as k says of a layer, or as the device's link is."""
    if question.k is None:
        known = named(question.hardware)
        assert known is not None
        return Tier(known.duplex_bytes_per_second, known.duplex_bytes_per_second)
    rate = 2 * layer.movable_bytes / (question.k * _compute_seconds(layer))
    return Tier(rate, rate)


def _k_of(layer: StageCost, tier: Tier) -> float:
    moving = layer.movable_bytes * (1 / tier.out_bytes_per_second + 1 / tier.in_bytes_per_second)
    return moving / _compute_seconds(layer)


def _compute_seconds(cost: StageCost) -> float:
    return cost.forward_seconds + cost.input_seconds + cost.weight_seconds


def record(
    found: Sequence[Candidate],
    chosen: Candidate,
    *,
    budget_bytes: int,
    tier: Tier | None,
    tier_name: str = "host",
    folder: str = "",
) -> Plan:
    """Write a choice as a record, with a choice for each stage and the schedule to run.

    Args:
        found: what it was chosen among.
        chosen: the choice.
        budget_bytes: what it had to fit.
        tier: the way to the tier; None where nothing may move.
        tier_name: "host" or "disk".
        folder: of the disk.

    Returns:
        The record.
    """
    timed, schedule = chosen.timed, chosen.timed.schedule
    plain = plain_of(found)
    moved_stages = schedule.num_ranks * chosen.num_moved
    choices = tuple(
        Choice(
            group=f"stage {stage}",
            choice="offload" if stage < moved_stages else "keep",
            bytes=cost.held_bytes,
            seconds=0.0,
        )
        for stage, cost in enumerate(timed.costs)
    )
    fullest = chosen.peaks_bytes.index(chosen.peak_bytes)
    held_bytes = chosen.copies[fullest].peak_bytes
    estimate = Estimate(
        device_peak_bytes=chosen.peak_bytes,
        host_peak_bytes=chosen.host_bytes if tier_name == "host" else 0,
        step_seconds=chosen.seconds,
        slowdown=chosen.seconds / plain.seconds,
        plain_peak_bytes=plain.peak_bytes,
        peak_by_category={"parameters": chosen.peak_bytes - held_bytes, "activations": held_bytes},
        peak_moment="backward",
    )
    moves = bool(chosen.num_moved) and tier is not None
    return Plan(
        device="any device",
        budget_bytes=budget_bytes,
        exact=True,
        choices=choices,
        state_formats={},
        estimate=estimate,
        smallest_budget_bytes=min(each.peak_bytes for each in found),
        tier=tier_name if moves else "",
        folder=folder if moves else "",
        out_bytes_per_second=tier.out_bytes_per_second if moves and tier is not None else 0.0,
        in_bytes_per_second=tier.in_bytes_per_second if moves and tier is not None else 0.0,
        pipeline=Pipeline(
            schedule=schedule.name,
            num_ranks=schedule.num_ranks,
            num_chunks=schedule.num_chunks,
            num_microbatches=schedule.num_microbatches,
            num_moved=chosen.num_moved,
            bubble=timed.bubble,
            peaks_bytes=chosen.peaks_bytes,
            hosts_bytes=tuple(each.stored_bytes for each in chosen.copies),
            orders=written(whole(timed, chosen.copies)),
        ),
    )


def told_of_link(chosen: Candidate, tier: Tier) -> str:
    """Say how busy the way to the tier is."""
    out, back = chosen.link_use(tier)
    return f"copies out keep a rank's link busy for {out:.0%} of a step, copies back for {back:.0%}"


def plain_of(found: Sequence[Candidate]) -> Candidate:
    """Return what a plan is compared with: 1F1B or its interleaved form, else the first schedule that there is."""
    return next(each for each in found if not each.num_moved)


def _notes(
    question: PipelineQuestion, shape: Shape, found: Sequence[Candidate], chosen: Candidate, *, k: float, tier: Tier
) -> list[str]:
    """Say what the numbers rest on."""
    rates = _rates(question)
    is_known = math.isfinite(rates.hop_bytes_per_second)
    hop = f"at {format_bytes(rates.hop_bytes_per_second)}/s" if is_known else "in no time"
    notes = [
        f"{shape.name} by its shape, {question.sequence_length} tokens a sequence, attention to all of them: bytes and "
        "operations are arithmetic, nothing was measured; a gradient of a matrix before it is added to others and what "
        "libraries take are not counted, nor is the optimiser's step; gradients and states stand under parameters",
        f"k is {k:.2f}: the time to move a layer's activations out and back, over that of its forward and backward; "
        f"activations go from rank to rank {hop}",
        f"slowdown and what nothing changed would take are those of {plain_of(found).name}",
    ]
    layers = sorted(set(layers_of(shape, question.num_ranks * question.num_chunks)))
    if len(layers) > 1:
        notes.append(f"stages have {layers[0]} or {layers[1]} layers, and wait for the larger ones")
    standard = {"1F1B"} if question.num_chunks == 1 else {"1F1B-I", "GIS"}
    missing = sorted(standard - {each.timed.schedule.name for each in found})
    if missing:
        notes.append(f"{', '.join(missing)} cannot run {question.num_microbatches} microbatches on so many ranks")
    left = sum(len(each.kept) for each in chosen.copies)
    notes += [f"{left} of the microbatches that were to move stay: their way out would not end in time"] * bool(left)
    if chosen.num_moved:
        notes.append(told_of_link(chosen, tier))
        together = format_bytes(sum(each.stored_bytes for each in chosen.copies))
        notes.append(f"of host memory a rank takes up to {format_bytes(chosen.host_bytes)}, all together {together}")
    return notes
