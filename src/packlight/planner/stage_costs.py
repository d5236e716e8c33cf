"""What stages of a pipeline take: bytes and seconds of each action, measured.

One microbatch goes through the pipeline a few times before training begins, by the same runtime that will train, with
everything moved to a tier and brought back. So each action's bytes are those that it will have: what F leaves, what
OFFLOAD takes away, what I adds. Ranks tell each other what they measured, and so know the costs of all stages.

Gradients, buffers and the state of torch's random numbers are put back; parameters are not touched, so that hooks which
step them inside backward are refused. On CUDA the allocator's peak statistics begin anew.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks

from packlight.activations.offload import Tier, make_tier
from packlight.pipeline.runtime import Runtime, told
from packlight.pipeline.schedule import Action, Schedule, uniform
from packlight.pipeline.simulate import StageCost
from packlight.pipeline.stage import Stage, cannot_split
from packlight.pipeline.whole import whole_of
from packlight.planner.meter import Meter, meter
from packlight.step import Link

NUM_TIMED = 3
UNBOUNDED_BYTES = 2**62
"""A schedule says what is on its way; the tier need not bound it again."""


@dataclass(frozen=True)
class Training:
    """What the stages of a pipeline are to be trained on.

    Attributes:
        stages: of this rank.
        loss_fn: of the last stage's output and a microbatch's target.
        num_microbatches: of a step.
        args, kwargs: as they are passed to `step` on this rank.
        target: the same.
        loss_kwargs: what the loss takes besides.
        options: torch's own, of the schedule: `scale_grads`, `args_chunk_spec` and the like.
    """

    stages: Sequence[Stage]
    loss_fn: Callable[..., Tensor]
    num_microbatches: int
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Tensor | None = None
    loss_kwargs: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Seen:
    """What an action of a stage was seen to take: bytes before, most and after, and seconds."""

    before: int = 0
    most: int = 0
    after: int = 0
    seconds: float = math.inf

    @property
    def change(self) -> int:
        """The bytes that it leaves."""
        return self.after - self.before

    @property
    def above(self) -> int:
        """The most bytes above those before."""
        return self.most - self.before


_Seen = dict[str, Seen]


class _Watcher:
    """Notes what each action takes; seconds are the least seen, bytes those of the pass with a meter."""

    def __init__(self, device: torch.device) -> None:
        self.seen: dict[int, _Seen] = {}
        self.meter: Meter | None = None
        self._device, self._began = device, 0.0

    def begins(self, action: Action) -> None:
        """An action begins."""
        seen = self.seen.setdefault(action.stage, {}).setdefault(action.kind, Seen())
        if self.meter is not None:
            seen.before = self.meter.level()
        self._began = self._now()

    def ends(self, action: Action) -> None:
        """It has ended."""
        seen = self.seen[action.stage][action.kind]
        if self.meter is None:
            seen.seconds = min(seen.seconds, self._now() - self._began)
        else:
            seen.most = self.meter.most()
            seen.after = self.meter.level()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def measure(training: Training, link: Link | None) -> tuple[StageCost, ...]:
    """Measure all stages of a pipeline; every rank calls it.

    Args:
        training: the stages, and a batch.
        link: the way to the tier, where a microbatch goes meanwhile; None: host memory, or on a CPU a file in the
            default temporary folder.

    Returns:
        By stage, the same on every rank.
    """
    seen = _seen(training, link)
    first = training.stages[0]
    hop_rate = min(told(_hop_rate(training, seen), first))
    return _costs([each for stages in told(seen, first) for each in stages], hop_rate)


def _seen(training: Training, link: Link | None) -> list[tuple[int, _Seen, _Seen | None]]:
    """Send a microbatch through the pipeline; return what was seen of this rank's stages, backward whole and split."""
    first = training.stages[0]
    device, shape = torch.device(first.device), (first.group_size, len(training.stages), 1)
    can_split = not any(itertools.chain(*told([cannot_split(stage) for stage in training.stages], first)))
    schedules = [_unsplit(uniform(*shape))] + [uniform(*shape)] * can_split
    with _unchanged(training.stages):
        full, *split = [_seen_of(training, schedule, device, link) for schedule in schedules]
    indices = [stage.stage_index for stage in training.stages]
    return [(index, full[index], split[0][index] if split else None) for index in indices]


def _seen_of(training: Training, schedule: Schedule, device: torch.device, link: Link | None) -> dict[int, _Seen]:
    """Follow a schedule of one microbatch, for its seconds as it is, for its bytes with everything moved."""
    watcher = _Watcher(device)
    options = {"loss_fn": training.loss_fn, "watch": watcher, **training.options}
    with Runtime(training.stages, schedule, **options) as runtime:  # copies would take time from compute
        for _ in range(NUM_TIMED):
            _step(runtime, training)
    kind = link.tier if link is not None else "host" if device.type == "cuda" else "disk"
    place = Link(kind, 1.0, 1.0, 0.0, UNBOUNDED_BYTES, folder=link.folder if link is not None else "")
    with Runtime(training.stages, _all_away(whole_of(schedule)), tier=tier_of(device, place), **options) as runtime:
        _step(runtime, training)
        with meter(device) as watcher.meter:
            _step(runtime, training)
    return watcher.seen


def _step(runtime: Runtime, training: Training) -> None:
    args, kwargs = training.args, dict(training.kwargs)
    if args or kwargs:
        specs = (training.options.get("args_chunk_spec"), training.options.get("kwargs_chunk_spec"))
        each_args, each_kwargs = split_args_kwargs_into_chunks(args, kwargs, training.num_microbatches, *specs)
        args, kwargs = each_args[0], each_kwargs[0]
    target = None if training.target is None else training.target.tensor_split(training.num_microbatches)[0]
    if training.loss_kwargs:
        kwargs["loss_kwargs"] = training.loss_kwargs
    runtime.step(*args, target=target, losses=[], return_outputs=False, **kwargs)


def _unsplit(schedule: Schedule) -> Schedule:
    """Return a schedule whose backwards are whole."""
    orders = [
        tuple(action._replace(kind="B") if action.kind == "I" else action for action in order if action.kind != "W")
        for order in schedule.orders
    ]
    return replace(schedule, orders=tuple(orders))


def _all_away(schedule: Schedule) -> Schedule:
    """Let everything leave as soon as it can, and come back as late as it can."""
    orders = []
    for order in schedule.orders:
        made = list[Action]()
        for action in order:
            if action.kind in ("I", "B"):
                made.append(action._replace(kind="RELOAD"))
            made.append(action)
            if action.kind == "SEND_F" or (action.kind == "F" and not _is_sent(action, schedule)):
                made.append(action._replace(kind="OFFLOAD"))
            if action.kind in ("W", "B"):
                made.append(action._replace(kind="RELEASE"))
        orders.append(tuple(made))
    return replace(schedule, orders=tuple(orders))


def _is_sent(action: Action, schedule: Schedule) -> bool:
    return schedule.num_ranks > 1 and action.stage < schedule.num_stages - 1


def _costs(stages: Sequence[tuple[int, _Seen, _Seen | None]], hop_rate: float) -> tuple[StageCost, ...]:
    """Return each stage's cost of what was seen; see `ledger.py` for what each action leaves."""
    by_stage = {stage: (full, split) for stage, full, split in stages}
    received = [by_stage[stage][0].get("RECV_F", Seen()).change for stage in range(len(by_stage))] + [0]
    costs = []
    for stage in range(len(by_stage)):
        full, split = by_stage[stage]
        backward, message = full["B"], received[stage + 1]
        movable = full["RELOAD"].change
        unheld = 0 if stage == len(by_stage) - 1 else -full["OFFLOAD"].change - movable
        held = full["F"].change + received[stage] - unheld
        cost = StageCost(
            forward_seconds=full["F"].seconds,
            input_seconds=backward.seconds,
            weight_seconds=0.0,
            held_bytes=held,
            movable_bytes=movable,
            message_bytes=message,
            unheld_bytes=unheld,
            forward_bytes=max(0, full["F"].most - full["F"].after),
            backward_bytes=backward.above,
            left_bytes=backward.change + held + message - received[stage],
            hop_seconds=message / hop_rate,
        )
        if split is not None and stage:
            weight_seconds, waiting = split["W"].seconds, split["I"].change - received[stage]
            cost = replace(cost, input_seconds=split["I"].seconds, weight_seconds=weight_seconds)
            most = {"input_bytes": split["I"].above, "weight_bytes": split["W"].above}
            cost = replace(cost, waiting_bytes=waiting, **most)
        costs.append(cost)
    return tuple(costs)


def _hop_rate(training: Training, stages: Sequence[tuple[int, _Seen, _Seen | None]]) -> float:
    """Return how fast bytes go from this rank to the next, while each sends; infinite where nothing is sent."""
    first = training.stages[0]
    sizes = told(max(full.get("RECV_F", Seen()).change for _, full, _ in stages), first)
    num_bytes = max(sizes)
    if first.group_size == 1 or not num_bytes:
        return math.inf
    group, device = first.group or distributed.group.WORLD, torch.device(first.device)
    assert group is not None
    others = [distributed.get_global_rank(group, (first.group_rank + way) % first.group_size) for way in (1, -1)]
    sent, received = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    way = [
        distributed.P2POp(distributed.isend, sent, others[0], group),
        distributed.P2POp(distributed.irecv, received, others[1], group),
    ]
    seconds = math.inf
    for _ in range(NUM_TIMED):
        begun = time.perf_counter()
        for work in distributed.batch_isend_irecv(way):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = min(seconds, time.perf_counter() - begun)
    return float(num_bytes / seconds)


def tier_of(device: torch.device, link: Link) -> Tier:
    """Make the tier that a link leads to; a schedule says what is on its way there, the tier does not bound it."""
    folder = link.folder or None
    host_bytes = link.capacity_bytes if link.tier == "host" and link.capacity_bytes < UNBOUNDED_BYTES else None
    return make_tier(link.tier, device=device, folder=folder, max_bytes=host_bytes, max_in_flight_bytes=UNBOUNDED_BYTES)


@contextmanager
def _unchanged(stages: Sequence[Stage]) -> Iterator[None]:
    """Put back gradients, buffers and the state of random numbers.

    Raises:
        ValueError: a parameter has a hook that runs when its gradient is there: it may step the parameter.
    """
    parameters = [each for stage in stages for each in stage.submod.parameters()]
    if any(getattr(each, "_post_accumulate_grad_hooks", None) for each in parameters):
        raise ValueError(
            "a parameter has a hook that runs as soon as its gradient is there, as an optimiser inside backward has: "
            "measuring would train it; plan first, then register the hooks"
        )
    gradients = [each.grad for each in parameters]
    buffers = [
        (module, name, each, each.detach().clone())
        for stage in stages
        for module in stage.submod.modules()
        for name, each in module._buffers.items()
        if each is not None
    ]
    devices = {torch.device(stage.device) for stage in stages if torch.device(stage.device).type == "cuda"}
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                module._buffers[name] = buffer
