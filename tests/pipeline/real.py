"""Real pipelines, one process a rank: `torchrun tests/pipeline/real.py WHAT,... FOLDER`.

Each rank writes FOLDER/WHAT/RANK.json.

The model is a decoder on the characters of Python's own sources, cut into a stage of blocks for each chunk.
"""

import copy
import datetime
import gc
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from packlight.activations.offload import Tier, make_tier
from packlight.budget import BudgetError
from packlight.pipeline import (
    Runtime,
    Schedule,
    Stage,
    grouped,
    interleaved,
    one_f_one_b,
    read,
    uniform,
)
from packlight.pipeline.choose import Candidate, candidates
from packlight.pipeline.copies import Tier as Way
from packlight.pipeline.copies import place
from packlight.pipeline.ledger import levels, peak
from packlight.pipeline.line import Lines
from packlight.pipeline.schedule import Action
from packlight.pipeline.simulate import StageCost, simulate
from packlight.pipeline.whole import whole
from packlight.planner.meter import Meter, meter
from packlight.planner.stage_costs import UNBOUNDED_BYTES, Training
from packlight.planner.staged import StagesAnswer, plan_stages
from packlight.records import Plan

WIDTH, NUM_HEADS, VOCABULARY, LENGTH, BATCH = 48, 3, 128, 24, 2
CPU = torch.device("cpu")
UNIT = StageCost(1.0, 1.0, 1.0, held_bytes=1, movable_bytes=1)


class Block(nn.Module):
    """Attention and a feed-forward network, before which values are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.queries, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        parts = self.queries(self.norms[0](x)).unflatten(-1, (3, NUM_HEADS, -1)).unbind(2)
        queries, keys, values = (part.transpose(1, 2) for part in parts)
        seen = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        made: Tensor = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        return made


class Embedding(nn.Module):
    """Characters and places."""

    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, length) to (batch, length, width)."""
        made: Tensor = self.characters(ids) + self.places.weight
        return made


def make_chunks(num_stages: int) -> nn.ModuleList:
    """The same on every rank; the second stage ends with a function that saves its result, and is larger."""
    torch.manual_seed(7)
    chunks = [nn.Sequential(Block()) for _ in range(num_stages)]
    chunks[0].insert(0, Embedding())
    chunks[1].extend([Block(), nn.Tanh()])
    chunks[-1].extend([nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)])
    return nn.ModuleList(chunks)


def text(num_sequences: int) -> tuple[Tensor, Tensor]:
    """Characters of a source file, and those that follow them; both (num_sequences, LENGTH)."""
    source = Path(json.__file__).read_bytes() + Path(argparse_file()).read_bytes()
    ids = torch.tensor([min(each, VOCABULARY - 1) for each in source[: num_sequences * LENGTH + 1]])
    return ids[:-1].view(-1, LENGTH), ids[1:].view(-1, LENGTH)


def argparse_file() -> str:
    """A long source file."""
    import argparse

    return argparse.__file__


def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over a microbatch."""
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


class Job:
    """A rank's part of a pipeline, and its data."""

    def __init__(self, num_chunks: int, num_microbatches: int, folder: Path) -> None:
        self.rank, self.num_ranks = distributed.get_rank(), distributed.get_world_size()
        self.num_microbatches, self.num_stages, self.folder = num_microbatches, self.num_ranks * num_chunks, folder
        self.all_chunks = make_chunks(self.num_stages)
        own = range(self.rank, self.num_stages, self.num_ranks)
        self.chunks = [self.all_chunks[index] for index in own]
        self.stages = [Stage(self.all_chunks[index], index, self.num_stages, CPU, min_bytes=0) for index in own]
        self.ids, self.target = text(BATCH * num_microbatches)
        self.args = (self.ids,) if self.rank == 0 else ()

    def tier(self) -> Tier:
        """A disk."""
        return make_tier("disk", device=CPU, folder=self.folder, max_in_flight_bytes=UNBOUNDED_BYTES)

    def training(self) -> Training:
        """What plans are made for."""
        return Training(self.stages, loss_fn, self.num_microbatches, self.args, target=self.target)

    def step(self, runtime: Runtime) -> list[Tensor]:
        """Run forward and backward of a batch."""
        losses: list[Tensor] = []
        runtime.step(*self.args, target=self.target, losses=losses, return_outputs=False)
        return losses

    def rules(self, num_chunks: int) -> list[tuple[Schedule, int]]:
        """Schedules of every rule, with a number of chunks that move."""
        shape = self.num_ranks, num_chunks, self.num_microbatches
        if num_chunks == 1:
            plain = one_f_one_b(self.num_ranks, self.num_microbatches)
            return [(plain, 0), (plain, 1)]
        half = grouped(*shape, group_size=(self.num_ranks + 1) // 2)
        return [
            (interleaved(*shape), 1),
            (grouped(*shape, group_size=self.num_ranks), 0),
            (half, 1),
            (half, num_chunks),
            (uniform(*shape), 1),
            (uniform(*shape), num_chunks),
        ]


def with_copies(schedule: Schedule, num_moved: int) -> Schedule:
    """Messages and copies, for stages of equal cost and a link that is fast enough for all."""
    timed, ranks = simulate(schedule, [UNIT]), schedule.num_ranks
    lines = Lines(timed)
    return whole(
        timed,
        [place(lines.line(rank), range(rank, num_moved * ranks, ranks), Way(4.0, 4.0)) for rank in range(ranks)],
    )


def gradients_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Those of all parameters; each has one."""
    found = [parameter.grad for module in modules for parameter in module.parameters()]
    assert all(each is not None for each in found)
    return [each for each in found if each is not None]


def gradients_alone(chunks: nn.ModuleList, job: Job) -> list[list[Tensor]]:
    """The unpipelined model's, of each chunk."""
    chunks.zero_grad()
    for ids, target in zip(job.ids.split(BATCH), job.target.split(BATCH), strict=True):
        loss_fn(nn.Sequential(*chunks)(ids), target).backward()
    return [[gradient / job.num_microbatches for gradient in gradients_of([chunk])] for chunk in chunks]


def gradients(job_of: Callable[[int, int], Job]) -> Iterator[dict[str, Any]]:
    """Hold each gradient against the unpipelined model's, for every rule and numbers of chunks that move."""
    for num_chunks, num in ((1, 6), (2, 8), (3, 12)):
        job = job_of(num_chunks, num)
        alone = copy.deepcopy(job.all_chunks)
        expected, parts = [], []
        for ids, target in zip(job.ids.split(BATCH), job.target.split(BATCH), strict=True):
            parts.append(nn.Sequential(*alone)(ids))
            loss = loss_fn(parts[-1], target)
            loss.backward()
            expected.append(loss.item())
        own = range(job.rank, job.num_stages, job.num_ranks)
        for schedule, num_moved in job.rules(num_chunks):
            made = with_copies(schedule, num_moved)
            with Runtime(job.stages, made, loss_fn=loss_fn, tier=job.tier()) as runtime:
                for chunk in job.chunks:
                    chunk.zero_grad()
                losses = job.step(runtime)
                moved_bytes = runtime.tier_traffic().bytes_out
                left_bytes = runtime.tier_traffic().stored_bytes
                with torch.no_grad():
                    outputs = runtime.eval(*job.args, target=job.target)
            worst, are_equal = 0.0, True
            for mine, theirs in zip(gradients_of(job.chunks), gradients_of(alone[index] for index in own), strict=True):
                wanted = theirs / num
                worst = max(worst, float((mine - wanted).norm() / wanted.norm()))
                are_equal = are_equal and torch.equal(mine, wanted)
            is_last = job.rank == job.num_ranks - 1
            yield {
                "schedule": made.name,
                "num_moved": num_moved,
                "num_offloads": sum(action.kind == "OFFLOAD" for action in made.orders[job.rank]),
                "moved_bytes": moved_bytes,
                "left_bytes": left_bytes,
                "worst": worst,
                "are_equal": are_equal,
                "losses_are_equal": not is_last or [loss.item() for loss in losses] == expected,
                "outputs_are_equal": not is_last or torch.equal(outputs, torch.cat(parts)),
            }


class Watcher:
    """Notes the live bytes after each action."""

    def __init__(self) -> None:
        self.meter: Meter | None = None
        self.most = 0
        self.levels: list[tuple[Action, int]] = []

    def begins(self, action: Action) -> None:
        """Nothing is asked for then: what a meter has seen most would begin anew."""

    def ends(self, action: Action) -> None:
        """Note the level, and the most since the last one."""
        if self.meter is not None:
            self.most = max(self.most, self.meter.most())
            self.levels.append((action, self.meter.level()))


def some_of(answer: StagesAnswer) -> list[Candidate]:
    """Each rule with nothing moved and with everything, as far as a link allows that is never late."""
    assert answer.plan.pipeline is not None
    num_chunks = len(answer.training.stages)
    shape = answer.plan.pipeline.num_ranks, num_chunks, answer.training.num_microbatches
    found = candidates(shape, answer.costs, tier=Way(1e12, 1e12, margin=0.0))
    return [each for each in found if each.num_moved in (0, num_chunks)]


def bytes_(job_of: Callable[[int, int], Job]) -> Iterator[dict[str, Any]]:
    """Hold the bytes after each action, and the peak, against what is predicted for it."""
    for num_chunks, num in ((1, 4), (2, 8)):
        job = job_of(num_chunks, num)
        answer = plan_stages(job.training(), budget="1GiB", disk=str(job.folder))
        for chosen in some_of(answer):
            watcher = Watcher()
            plan = replace(answer.plan, tier="disk" if chosen.num_moved else "")
            made = replace(answer, chosen=chosen, plan=plan)
            with made.runtime(watch=watcher) as runtime:
                job.step(runtime)
                with meter(CPU) as watcher.meter:
                    before = watcher.meter.level()
                    job.step(runtime)
                    watcher.most = max(watcher.most, watcher.meter.most())
                    after = watcher.meter.level()
            schedule = made.schedule
            seen = [level - before for _, level in watcher.levels]
            yield {
                "name": chosen.name,
                "follows": tuple(action for action, _ in watcher.levels) == schedule.orders[job.rank],
                "num_events": len(seen),
                "num_offloads": sum(action.kind == "OFFLOAD" for action in schedule.orders[job.rank]),
                "wrong": sum(a != b for a, b in zip(seen, levels(schedule, job.rank, answer.costs), strict=True)),
                "most_after": max(seen),
                "peak": watcher.most - before,
                "predicted": chosen.copies[job.rank].peak_bytes,
                "recounted": peak(schedule, job.rank, answer.costs),
                "left": after - before,
            }


def count(runtime: Runtime) -> dict[str, int]:
    """What there is that could grow."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.device == CPU]
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    return {
        "tensors": len(tensors),
        "bytes": sum(storages.values()),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "stored": runtime.tier_traffic().stored_bytes,
    }


def count_call(module: nn.Module, _: object) -> None:
    """Change a buffer, as a batch norm does."""
    module.get_buffer("calls").add_(1)


def planned(job_of: Callable[[int, int], Job]) -> Iterator[dict[str, Any]]:
    """Plan for an ample, a tight and an impossible budget; save, load and carry out what was planned."""
    job = job_of(2, 8)
    modules = nn.ModuleList(job.chunks)
    job.chunks[0].register_buffer("calls", torch.zeros(()))
    handle = job.chunks[0].register_forward_pre_hook(count_call)
    before = copy.deepcopy(modules.state_dict()), torch.get_rng_state()
    ample = plan_stages(job.training(), budget="100%", disk=str(job.folder), beside_bytes=1000)
    assert ample.plan.estimate is not None
    least = min(each.peak_bytes for each in ample.found)
    tight = plan_stages(
        job.training(), budget=(least + ample.plan.estimate.device_peak_bytes) // 2, disk=str(job.folder)
    )
    error = ""
    try:
        plan_stages(job.training(), budget=1000, disk=str(job.folder))
    except BudgetError as refused:
        error = str(refused)
    is_unchanged = all(torch.equal(each, before[0][name]) for name, each in modules.state_dict().items())
    is_unchanged = is_unchanged and torch.equal(torch.get_rng_state(), before[1])
    is_unchanged = is_unchanged and all(parameter.grad is None for parameter in modules.parameters())
    handle.remove()
    path = job.folder.parent / f"plan-{job.rank}.json"
    tight.plan.save(path)
    loaded = Plan.load(path)
    path.unlink()
    assert loaded.pipeline is not None and loaded.estimate is not None
    resident = sum(2 * parameter.nbytes for parameter in modules.parameters()) + 4
    watcher = Watcher()
    tier = job.tier() if loaded.tier else None
    with Runtime(job.stages, read(loaded.pipeline), loss_fn=loss_fn, tier=tier, watch=watcher) as runtime:
        job.step(runtime)
        with meter(CPU) as watcher.meter:
            start = watcher.meter.level()
            job.step(runtime)
            watcher.most = max(watcher.most, watcher.meter.most())
        stored = runtime.tier_traffic().most_stored_bytes
    yield {
        "is_unchanged": is_unchanged,
        "error": error,
        "ample": ample.plan.pipeline.schedule if ample.plan.pipeline is not None else "",
        "name": loaded.pipeline.schedule,
        "orders": [*loaded.pipeline.orders],
        "budget": loaded.budget_bytes,
        "predicted": loaded.pipeline.peaks_bytes[job.rank],
        "peak": resident + watcher.most - start,
        "stored": stored,
        "predicted_stored": loaded.pipeline.hosts_bytes[job.rank],
    }


def compiled(job_of: Callable[[int, int], Job]) -> Iterator[dict[str, Any]]:
    """Compile the stages; backward is not split then."""
    job = job_of(2, 4)
    alone = copy.deepcopy(job.all_chunks)
    compiled_ones = [torch.compile(chunk, backend="aot_eager") for chunk in job.chunks]
    own = range(job.rank, job.num_stages, job.num_ranks)
    job.stages = [
        Stage(chunk, index, job.num_stages, CPU, min_bytes=0)  # type: ignore[arg-type]
        for chunk, index in zip(compiled_ones, own, strict=True)
    ]
    answer = plan_stages(job.training(), budget="100%", disk=str(job.folder))
    with answer.runtime() as runtime:
        job.step(runtime)
    expected = gradients_alone(alone, job)
    pairs = zip(gradients_of(job.chunks), (each for index in own for each in expected[index]), strict=True)
    assert answer.plan.pipeline is not None
    yield {
        "schedule": answer.plan.pipeline.schedule,
        "worst": max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs),
    }


def steps(job_of: Callable[[int, int], Job]) -> Iterator[dict[str, Any]]:
    """Train for 50 steps with everything moved, and count what there is."""
    job = job_of(2, 6)
    made = with_copies(uniform(job.num_ranks, 2, 6), 2)
    parameters = [each for chunk in job.chunks for each in chunk.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    counts, losses = list[dict[str, int]](), list[float]()
    with Runtime(job.stages, made, loss_fn=loss_fn, tier=job.tier()) as runtime:
        for at in range(50):
            optimizer.zero_grad()
            losses.append(sum(float(loss) for loss in job.step(runtime)))
            optimizer.step()
            if at in (2, 9, 19, 29, 39, 49):
                counts.append(count(runtime))
    forwards = [type(chunk).forward is getattr(chunk.forward, "__func__", None) for chunk in job.chunks]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in job.all_chunks.modules())
    yield {
        "counts": counts,
        "losses": losses,
        "forwards_are_back": all(forwards),
        "hooks": hooks,
        "threads_after": threading.active_count(),
    }


def killed(job_of: Callable[[int, int], Job]) -> Iterator[dict[str, Any]]:
    """Let rank 1 be killed in the middle of the second step."""

    class Killer(Watcher):
        """Counts actions."""

        num_actions = 0

        def begins(self, action: Action) -> None:
            self.num_actions += 1
            if job.rank == 1 and self.num_actions == 3 * len(made.orders[1]) // 2:
                os.kill(os.getpid(), signal.SIGKILL)

    job = job_of(2, 6)
    made = with_copies(uniform(job.num_ranks, 2, 6), 2)
    begun = time.monotonic()
    runtime = Runtime(job.stages, made, loss_fn=loss_fn, tier=job.tier(), watch=Killer())
    try:
        for _ in range(3):
            begun = time.monotonic()
            job.step(runtime)
    except RuntimeError as error:
        stored = runtime.tier_traffic().stored_bytes
        runtime.close()
        yield {"error": str(error), "seconds": time.monotonic() - begun, "stored": stored}
    finally:
        runtime.close()


def failing(job_of: Callable[[int, int], Job]) -> Iterator[dict[str, Any]]:
    """Let the loss fail at a microbatch of the second step, on the last rank; the others hear of it or time out."""
    job = job_of(2, 6)
    made, num_calls = with_copies(uniform(job.num_ranks, 2, 6), 2), itertools.count(1)

    def fails(logits: Tensor, target: Tensor) -> Tensor:
        if next(num_calls) == 12:
            raise ArithmeticError("the loss failed")
        return loss_fn(logits, target)

    with meter(CPU) as line:
        runtime = Runtime(job.stages, made, loss_fn=fails, tier=job.tier())
        job.step(runtime)
        for chunk in job.chunks:
            chunk.zero_grad()
        before = line.level()
        try:
            job.step(runtime)
        except (ArithmeticError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
            error.__traceback__ = error.__context__ = error.__cause__ = None
            del error
        stored = runtime.tier_traffic().stored_bytes
        for chunk in job.chunks:
            chunk.zero_grad()
        gc.collect()
        yield {"error": said, "stored": stored, "left": line.level() - before}
        runtime.close()


def disagreeing(job_of: Callable[[int, int], Job]) -> Iterator[dict[str, Any]]:
    """Let ranks do different things, or one of them something wrong; all are told."""
    job = job_of(2, 6)
    one, other = uniform(job.num_ranks, 2, 6), grouped(job.num_ranks, 2, 6, group_size=job.num_ranks)
    is_last = job.rank == job.num_ranks - 1

    def step(schedule: Schedule = one, *, loss: Callable[..., Tensor] | None = loss_fn, num_rows: int = 999) -> None:
        with Runtime(job.stages, schedule, loss_fn=loss) as runtime:
            args = tuple(each[:num_rows] for each in job.args)
            runtime.step(*args, target=job.target if loss else None, losses=[] if loss else None, return_outputs=False)

    few = replace(job.training(), num_microbatches=10**6)
    for act in (
        lambda: step(one if job.rank else other),
        lambda: step(loss=loss_fn if is_last else None),
        lambda: step(num_rows=5),
        lambda: plan_stages(few, budget="4GiB"),
        lambda: plan_stages(job.training(), budget="4GiB", disk=None if job.rank else "/no/such/folder"),
    ):
        try:
            act()
        except ValueError as error:
            yield {"error": str(error)}


def replicated(job_of: Callable[[int, int], Job]) -> Iterator[dict[str, Any]]:
    """Two replicas of a pipeline of one rank and two stages, in DistributedDataParallel."""
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    groups = [distributed.new_group([each]) for each in range(num_ranks)]
    torch.manual_seed(3)
    modules = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)]
    batches = torch.randn(num_ranks, 8, 8)
    alone = copy.deepcopy(nn.Sequential(*modules))
    for part in batches.flatten(0, 1).split(2):
        (functional.mse_loss(alone(part), part) / (4 * num_ranks)).backward()
    stages = [
        Stage(nn.parallel.DistributedDataParallel(module), at, 2, CPU, group=groups[rank])
        for at, module in enumerate(modules)
    ]
    refused = ""
    try:
        Runtime(stages, uniform(1, 2, 4), loss_fn=functional.mse_loss)
    except ValueError as error:
        refused = str(error)
    training = Training(stages, functional.mse_loss, 4, (batches[rank],), target=batches[rank])
    answer = plan_stages(training, budget="4GiB")
    with answer.runtime() as runtime:
        runtime.step(batches[rank], target=batches[rank], return_outputs=False)
    found = [each.grad for module in modules for each in module.parameters()]
    errors = [float((a - b.grad).abs().max()) for a, b in zip(found, alone.parameters(), strict=True)]  # type: ignore[operator]
    yield {"refused": refused, "schedule": answer.schedule.name, "error": max(errors)}


@contextmanager
def group() -> Iterator[None]:
    """The processes of this run."""
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    try:
        yield
    finally:
        if sys.exc_info()[0] is None:
            distributed.destroy_process_group()


WHAT: dict[str, Callable[[Callable[[int, int], Job]], Iterator[dict[str, Any]]]] = {
    "gradients": gradients,
    "bytes": bytes_,
    "planned": planned,
    "compiled": compiled,
    "steps": steps,
    "killed": killed,
    "failing": failing,
    "disagreeing": disagreeing,
    "replicated": replicated,
}


def main() -> None:
    """Run some of them, one after the other."""
    torch.set_num_threads(1)
    context: AbstractContextManager[None] = group()
    with context:
        rank = distributed.get_rank()
        for what in sys.argv[1].split(","):
            folder = Path(sys.argv[2]) / what
            spilled = folder / "spilled"
            spilled.mkdir(parents=True, exist_ok=True)
            found = list(WHAT[what](partial(Job, folder=spilled)))
            (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
