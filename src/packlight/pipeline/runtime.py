"""Carries out a schedule on torch.distributed.pipelining, action by action.

torch's runtime walks along a list of actions and looks each one's kind up in a table. Kinds of our own in that list,
and entries of our own for messages, are all that offload needs; computing, losses, gradients' scale and FSDP's steps
stay torch's. The list is the one whose bytes were counted (`whole.py`), with what torch adds for FSDP.

    RECV_F  make the buffer, begin to receive        SEND_F  wait for the send before, take its data away, begin to send
    OFFLOAD wait for the copies, let go of bytes     RELOAD  begin to copy back        RELEASE  give up the place

A step that fails gives up what it has: buffers, parcels, places on the tier. What it sent may still be on its way, and
would be taken for the next step's; so where there are several ranks, it was the last one.
"""

import enum
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Protocol, Self

import torch
from torch import distributed
from torch.distributed.pipelining import schedules

from packlight.activations.offload import Tier, Traffic
from packlight.pipeline.schedule import COMPUTE, Action, Schedule, ScheduleError
from packlight.pipeline.stage import Stage, cannot_split
from packlight.pipeline.whole import check_messages, whole_of

_Works = list[distributed.Work]


class _Kind(enum.StrEnum):
    """Kinds of actions that torch does not have."""

    OFFLOAD = "OFFLOAD"
    RELOAD = "RELOAD"
    RELEASE = "RELEASE"
    ENDED = "ENDED"
    """Tells a watch that what was computed is done."""


class Watch(Protocol):
    """Is told what a rank does."""

    def begins(self, action: Action) -> None:
        """An action begins; what it needs from others is there."""

    def ends(self, action: Action) -> None:
        """It has ended."""


class Runtime(schedules._PipelineScheduleRuntime):
    """A schedule that trains, as torch's own do: call `step`, and `close` after the last one.

    Args:
        stages: of this rank, in the order of their numbers.
        schedule: the same one on every rank; without messages, they are put where stages of equal cost need them.
        loss_fn: of the last stage's output and a microbatch's target; None: no backward.
        tier: where parcels go, closed with this; None where nothing moves.
        watch: is told of each action.
        options: torch's own: `scale_grads`, `args_chunk_spec`, `output_merge_spec` and the like.

    Raises:
        ScheduleError: the schedule breaks a rule, is for other stages or ranks, moves parcels without a tier, or splits
            backward where a stage is compiled or in DistributedDataParallel.

    `step` takes torch's arguments. With `return_outputs=True`, torch's default, the last stage's outputs stay until the
    step ends; plans count on False. As torch's, `scale_grads=True` divides all that is in `.grad` by the number of
    microbatches at the end of each step: to accumulate gradients over steps, pass `scale_grads=False` and divide the
    loss. A stage that the loss does not hang on gets gradients of 0 from another rank, where it alone has none.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: Schedule,
        *,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        tier: Tier | None = None,
        watch: Watch | None = None,
        **options: Any,
    ) -> None:
        with ExitStack() as undo:
            if tier is not None:
                undo.callback(tier.close)
            self.schedule = whole_of(schedule)
            check_messages(self.schedule)
            _check_stages(stages, self.schedule, tier)
            super().__init__(list(stages), schedule.num_microbatches, loss_fn, **options)  # type: ignore[no-untyped-call]
            self._by_index = {stage.stage_index: stage for stage in stages}
            self._tier, self._watch = tier, watch
            self._sent: dict[str, tuple[Stage, int, _Works]] = {}
            self._agreed: bool | None = None
            self._ended = ""
            self._put_in_order()
            self._comp_type_to_function_map.update(dict.fromkeys((*_Kind, *_MESSAGES), self._perform))
            self._comp_type_to_function_map[schedules.REDUCE_GRAD] = self._reduce
            for stage in stages:
                moving = {at for kind, index, at in self._order() if (kind, index) == ("OFFLOAD", stage.stage_index)}
                undo.callback(stage.open(tier, moving, begins=self._begins))
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Give the stages and the tier up; calling it again does nothing."""
        self._ended = self._ended or "this Runtime is closed; make a new one"
        self._undo.close()

    def tier_traffic(self) -> Traffic:
        """Return what the tier has moved and stores; nothing where there is none."""
        return Traffic(0, 0, 0.0, 0.0, 0, 0) if self._tier is None else self._tier.traffic()

    def __enter__(self) -> Self:
        """Return the runtime itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()

    def _order(self) -> tuple[Action, ...]:
        return self.schedule.orders[self.rank]

    def _put_in_order(self) -> None:
        """Write the list that torch walks along: what it adds for FSDP and for the scale of gradients, and ours."""
        computing = {
            rank: [_of_torch(action) for action in self.schedule.computing(rank)]
            for rank in range(self.schedule.num_ranks)
        }
        self._prepare_schedule_with_comms(computing)
        for rank, theirs in self.pipeline_order_with_comms.items():
            ahead, waiting = dict[Any, list[Any]](), list[Any]()
            for action in theirs:
                if action.computation_type in _COMPUTE:
                    ahead[action], waiting = waiting, []
                elif action.computation_type not in _MESSAGES:
                    waiting.append(action)
            made = list[Any]()
            for each in self.schedule.orders[rank]:
                action = _of_torch(each)
                made += [*ahead.get(action, ()), action]
                if self._watch is not None and each.kind in COMPUTE:
                    made.append(action._replace(computation_type=_Kind.ENDED, sub_actions=(action,)))
            self.pipeline_order_with_comms[rank] = [*made, *waiting]

    def step(self, *args: Any, target: Any = None, losses: list[Any] | None = None, **kwargs: Any) -> Any:
        """Run a step, or what `eval` wants of one, on a whole batch; arguments are torch's.

        Returns:
            The last stage's outputs, if they are asked for.

        Raises:
            RuntimeError: the Runtime is closed, or a step has failed.
            ScheduleError: ranks have different schedules or losses, or the batch has fewer rows than microbatches.
            ValueError: a microbatch has another shape than the others.
        """
        if self._ended:
            raise RuntimeError(self._ended)
        problem = too_few_rows((target, *(args if self._args_chunk_spec is None else ())), self._n_microbatches)
        if self._agreed is not self._has_backward:
            self._agree(problem)
        if problem:
            raise ScheduleError(problem)
        return super().step(*args, target=target, losses=losses, **kwargs)

    def _step_microbatches(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super()._step_microbatches(*args, **kwargs)
            for kind in tuple(self._sent):
                self._finish(kind)
        except BaseException:
            self._give_up()
            if self.schedule.num_ranks > 1:
                self._ended = (
                    "a step of this Runtime has failed, and its messages may still come to the next one; end all ranks "
                    "and start again from a checkpoint, or make a new process group, stages and Runtime"
                )
            raise
        return result

    def _agree(self, problem: str) -> None:
        """Raise on every rank what is wrong on any: else some would wait for the others for ever."""
        mine = zlib.crc32(repr(self.schedule.orders).encode()), self._has_backward, problem
        found = told(mine, next(iter(self._by_index.values())))
        problems = {f"rank {rank}: {each}" for rank, (_, _, each) in enumerate(found) if each}
        if len({orders for orders, _, _ in found}) > 1:
            problems.add(
                "ranks have different schedules; make it from the same numbers on each, or make it on one and send it"
            )
        if len({backward for _, backward, _ in found}) > 1:
            problems.add(
                "some ranks go backward and others do not; pass loss_fn on every rank, and call step or eval on all"
            )
        if problems:
            raise ScheduleError("; ".join(sorted(problems)))
        self._agreed = self._has_backward

    def _give_up(self) -> None:
        """Let go of what a step that failed had: nobody will ask for it."""
        self._sent.clear()
        self.fwd_recv_ops.clear()
        self.bwd_recv_ops.clear()
        self._internal_losses.clear()
        for name in ("unshard_ops", "unsharded_stages"):  # FSDP's
            if hasattr(self, name):
                getattr(self, name).clear()
        for stage in self._by_index.values():
            stage.forget()

    def _perform(self, action: Any, _context: Any) -> None:
        """Carry out an action that is not torch's."""
        if action.computation_type is _Kind.ENDED:
            assert self._watch is not None
            self._watch.ends(_ours(action.sub_actions[0]))
            return
        if self._watch is not None:
            self._watch.begins(_ours(action))
        stage, microbatch = self._by_index[action.stage_index], action.microbatch_index
        kind = str(action.computation_type.value)
        if kind.startswith("SEND"):
            self._send(kind[-1], stage, microbatch)
        elif kind.startswith("RECV"):
            self._receive(kind[-1], stage, microbatch)
        elif stage.has_backward:
            self._copy(kind, stage, microbatch)
        if self._watch is not None:
            self._watch.ends(_ours(action))

    def _reduce(self, action: Any, _context: Any) -> None:
        """Reduce and scale gradients, where there was a backward; torch's own divides them after `eval` too."""
        stage = self._by_index[action.stage_index]
        if stage.has_backward:
            stage.perform_reduce_grad(self._n_microbatches if self.scale_grads else 1)

    def _begins(self, action: Action) -> None:
        """An action of compute begins; where a gradient has come back, the output that it is of was received."""
        if action.kind in ("I", "B"):
            self._finish_if(self._by_index[action.stage], action.microbatch)
        if self._watch is not None:
            self._watch.begins(action)

    def _send(self, kind: str, stage: Stage, microbatch: int) -> None:
        self._finish(kind)
        made = stage.get_fwd_send_ops(microbatch) if kind == "F" else stage.get_bwd_send_ops(microbatch)
        self._sent[kind] = stage, microbatch, schedules._batch_p2p(made)

    def _finish(self, kind: str) -> None:
        """Wait for the last send of a kind, and let go of what was sent."""
        if kind in self._sent:
            stage, microbatch, works = self._sent.pop(kind)
            schedules._wait_batch_p2p(works)
            if kind == "F":
                stage.sent(microbatch)

    def _receive(self, kind: str, stage: Stage, microbatch: int) -> None:
        is_forward = kind == "F"
        if is_forward or stage.has_backward:
            stage.ask(kind, microbatch)
        made = stage.get_fwd_recv_ops(microbatch) if is_forward else stage.get_bwd_recv_ops(microbatch)
        awaited = self.fwd_recv_ops if is_forward else self.bwd_recv_ops
        awaited[stage.stage_index, microbatch] = schedules._batch_p2p(made)

    def _copy(self, kind: str, stage: Stage, microbatch: int) -> None:
        if kind == "RELEASE":
            stage.release(microbatch)
            return
        if kind == "RELOAD":
            stage.parcel(microbatch).fetch()
            return
        self._finish_if(stage, microbatch)
        stage.parcel(microbatch).leave()

    def _finish_if(self, stage: Stage, microbatch: int) -> None:
        """Wait for the last output that was sent, if it is this one."""
        if self._sent.get("F", ())[:2] == (stage, microbatch):
            self._finish("F")


_COMPUTE = (schedules.FORWARD, schedules.BACKWARD_INPUT, schedules.BACKWARD_WEIGHT, schedules.FULL_BACKWARD)
_MESSAGES = (schedules.SEND_F, schedules.RECV_F, schedules.SEND_B, schedules.RECV_B)


_KINDS = {str(each.value): each for each in (*_COMPUTE, *_MESSAGES, *_Kind)}


def _of_torch(action: Action) -> Any:
    return schedules._Action(action.stage, _KINDS[action.kind], action.microbatch)


def _ours(action: Any) -> Action:
    return Action(str(action.computation_type.value), action.stage_index, action.microbatch_index)


def _check_stages(stages: Sequence[Stage], schedule: Schedule, tier: Tier | None) -> None:
    if not stages:
        raise ScheduleError("no stage came; wanted those of this rank")
    first = stages[0]
    shape = f"{schedule.num_stages} stages on {schedule.num_ranks} ranks"
    if (first.num_stages, first.group_size) != (schedule.num_stages, schedule.num_ranks):
        raise ScheduleError(
            f"stages of a pipeline of {first.num_stages} on {first.group_size} ranks came for a schedule of {shape}"
        )
    wanted = list(range(first.group_rank, schedule.num_stages, schedule.num_ranks))
    found = [stage.stage_index for stage in stages]
    if found != wanted:
        raise ScheduleError(f"rank {first.group_rank} has the stages {found}; wanted {wanted} for {shape}")
    if first.group_size == 1 and not hasattr(schedules.PipelineScheduleMulti, "_initialize_pp_stages"):
        raise ScheduleError(
            f"torch {torch.__version__} sends messages to itself on one rank; take 2 ranks, or torch 2.13"
        )
    kinds = {action.kind for action in schedule.orders[first.group_rank]}
    if "OFFLOAD" in kinds and tier is None:
        raise ScheduleError("the schedule moves activations, but no tier came; pass tier=make_tier(...)")
    reason = next((reason for stage in stages if (reason := cannot_split(stage))), None)
    if "I" in kinds and reason:
        raise ScheduleError(
            f"{schedule.name} splits backward, and a stage is {reason}; take 1F1B or its interleaved form"
        )


def too_few_rows(given: Iterable[Any], num_microbatches: int) -> str:
    """Tell what is wrong with a batch that has fewer rows than microbatches; nothing if it has as many."""
    rows = [each.shape[0] for each in given if isinstance(each, torch.Tensor) and each.dim()]
    if min(rows, default=num_microbatches) >= num_microbatches:
        return ""
    return (
        f"{num_microbatches} microbatches came for a batch of {min(rows)} rows; make the batch larger, or the schedule "
        "for fewer microbatches"
    )


def told(mine: Any, stage: Stage) -> list[Any]:
    """Return what every rank of a stage's pipeline says, in the order of ranks; every rank calls it."""
    if stage.group_size == 1:
        return [mine]
    found: list[Any] = [None] * stage.group_size
    device = torch.device(stage.device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # NCCL sends from the current one
        distributed.all_gather_object(found, mine, group=stage.group)
    return found
