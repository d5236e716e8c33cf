"""Claim: pipelines take the bytes and the time that their plan says, and no more of either than torch's own schedules.

A GPT on the sources of Python's standard library is cut into stages, and all schedules train it in the same processes:
torch's two interleaved ones and packlight's, plain and with half or all chunks of each rank moved to a disk. For each:

    bytes     most on a rank's device beyond parameters, gradients and batch, in a step; receive buffers, which torch
              makes before its first one, count. Predicted: the plan's, for packlight's
    seconds   median of the rounds, in each of which everyone does a step; predicted by the plan

Predictions made before: torch's 1F1B-I takes more bytes than packlight's, by a receive buffer for each microbatch and
stage each way, and all that was sent; gradients are equal; bytes are as predicted to the byte; seconds within a tenth,
where a core is there for each process; what moves costs nothing where the disk takes it in the time of compute.

    torchrun --nproc-per-node 2 benchmarks/pipeline_run.py --output benchmarks/results/HARDWARE/pipeline_run.json
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from torch.nn import functional

from packlight.budget import format_bytes
from packlight.demo.train_gpt import GPT, Shape, draw_batch, read_text
from packlight.integrations.script import environment
from packlight.pipeline import Stage
from packlight.pipeline.choose import Candidate
from packlight.planner.meter import meter
from packlight.planner.stage_costs import Training
from packlight.planner.staged import StagesAnswer, plan_stages

CPU = torch.device("cpu")
SEED = 5


class Embedding(nn.Module):
    """The demo's: bytes and places."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.token, self.position = model.token, model.position

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (batch, length) to (batch, length, width)."""
        made: Tensor = self.token(tokens) + self.position(torch.arange(tokens.size(1), device=tokens.device))
        return made


def chunks_of(model: GPT, num_stages: int) -> list[nn.Sequential]:
    """Cut the model into stages of as many blocks each."""
    each = len(model.blocks) // num_stages
    chunks = [nn.Sequential(*model.blocks[at * each : (at + 1) * each]) for at in range(num_stages)]
    chunks[0].insert(0, Embedding(model))
    chunks[-1].extend([model.norm, model.head])
    return chunks


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, of a microbatch."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


Step = Callable[[], None]


@dataclass
class Contender:
    """A way to run the pipeline, and what it took on this rank.

    Attributes:
        name: of it.
        running: makes it ready, gives what does a step, and takes it down.
        predicted_bytes: of this rank; None for torch's.
        predicted_seconds: of a step.
        peak_bytes: most in a step.
        gradients: of a step.
        seconds: of each step that was timed.
    """

    name: str
    running: Callable[[], AbstractContextManager[Step]]
    predicted_bytes: int | None = None
    predicted_seconds: float | None = None
    peak_bytes: int = 0
    gradients: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Bench:
    """A rank's part.

    Args:
        options: of the command line.
        folder: that is moved to.
    """

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.rank, self.num_ranks = distributed.get_rank(), distributed.get_world_size()
        self.options, self.folder = options, folder
        num_stages = self.num_ranks * options.chunks
        torch.manual_seed(SEED)
        shape = Shape(options.length, options.width, options.layers, options.width // 64)
        self.all_chunks = chunks_of(GPT(shape), num_stages)
        self.own = range(self.rank, num_stages, self.num_ranks)
        self.parameters = [each for at in self.own for each in self.all_chunks[at].parameters()]
        generator = torch.Generator().manual_seed(SEED)
        num = options.microbatches * options.batch
        tokens, self.targets = draw_batch(read_text()[0], generator, batch=num, context=options.length)
        self.args = (tokens,) if self.rank == 0 else ()

    def contenders(self) -> tuple[StagesAnswer, list[Contender]]:
        """Plan, and return everyone: torch's first."""
        stages = [Stage(self.all_chunks[at], at, len(self.all_chunks), CPU) for at in self.own]
        training = Training(stages, loss_fn, self.options.microbatches, self.args, target=self.targets)
        answer = plan_stages(training, budget="100%", disk=self.folder)
        found = [
            Contender(f"torch {name}", lambda make=make: self._theirs(make))  # type: ignore[misc]
            for name, make in (("1F1B-I", ScheduleInterleaved1F1B), ("zero bubble", ScheduleInterleavedZeroBubble))
        ]
        numbers = {0, (self.options.chunks + 1) // 2, self.options.chunks}
        for each in answer.found:
            if each.num_moved in numbers:
                predicted = each.copies[self.rank].peak_bytes
                ready = functools.partial(self._ours, answer, each)
                found.append(Contender(each.name, ready, predicted, each.seconds))
        return answer, found

    @contextmanager
    def _theirs(self, make: Any) -> Iterator[Step]:
        stages = [PipelineStage(self.all_chunks[at], at, len(self.all_chunks), CPU) for at in self.own]
        schedule = make(stages, self.options.microbatches, loss_fn)
        yield lambda: schedule.step(*self.args, target=self.targets, losses=[], return_outputs=False)

    @contextmanager
    def _ours(self, answer: StagesAnswer, chosen: Candidate) -> Iterator[Step]:
        plan = replace(answer.plan, tier="disk" if chosen.num_moved else "")
        with replace(answer, chosen=chosen, plan=plan).runtime() as runtime:
            yield lambda: runtime.step(*self.args, target=self.targets, losses=[], return_outputs=False)

    def weigh(self, each: Contender) -> None:
        """Measure the bytes of its second step, and note its gradients."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        with meter(CPU) as line:
            before = line.level()
            with each.running() as step:
                step()
                for parameter in self.parameters:
                    assert parameter.grad is not None
                    parameter.grad.zero_()
                line.level()
                step()
                each.peak_bytes = line.most() - before
        each.gradients = [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]

    def time(self, each: Contender) -> None:
        """Time a few steps."""
        with each.running() as step:
            step()
            for _ in range(self.options.steps):
                distributed.barrier()
                begun = time.perf_counter()
                step()
                distributed.barrier()
                each.seconds.append(time.perf_counter() - begun)


def rows_of(bench: Bench, found: list[Contender]) -> list[dict[str, Any]]:
    """Return what all ranks saw."""
    first, rows = found[0], []
    for each in found:
        worst = max(
            float((mine - theirs).norm() / theirs.norm())
            for mine, theirs in zip(each.gradients, first.gradients, strict=True)
        )
        mine = {"peak": each.peak_bytes, "predicted": each.predicted_bytes, "worst": worst}
        told: list[Any] = [None] * bench.num_ranks
        distributed.all_gather_object(told, mine)
        rows.append(
            {
                "name": each.name,
                "peaks_bytes": [one["peak"] for one in told],
                "predicted_bytes": [one["predicted"] for one in told] if each.predicted_bytes is not None else None,
                "seconds": statistics.median(each.seconds),
                "all_seconds": each.seconds,
                "predicted_seconds": each.predicted_seconds,
                "gradients_off": max(one["worst"] for one in told),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print what was found."""
    table = Table(title="a step: most bytes of a rank, and seconds; measured / predicted")
    for title in ("schedule", "bytes", "of torch's", "seconds", "of torch's", "gradients off"):
        table.add_column(title, justify="right")
    first = rows[0]
    for row in rows:
        peak, told = max(row["peaks_bytes"]), row["predicted_bytes"]
        seconds = f"{row['predicted_seconds']:.2f}" if row["predicted_seconds"] else "-"
        table.add_row(
            row["name"],
            f"{format_bytes(peak)} / {format_bytes(max(told)) if told else '-'}",
            f"{peak / max(first['peaks_bytes']):.2f}",
            f"{row['seconds']:.2f} / {seconds}",
            f"{row['seconds'] / first['seconds']:.2f}",
            f"{row['gradients_off']:.1e}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Run everyone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write what was found, as JSON")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="what is moved goes there")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    bench = Bench(options, options.folder)
    load = os.getloadavg()[0]
    answer, found = bench.contenders()
    for each in found:
        bench.weigh(each)
    for at in range(options.rounds):
        for each in found[at % len(found) :] + found[: at % len(found)]:
            bench.time(each)
    rows = rows_of(bench, found)
    if bench.rank == 0:
        show(rows)
        if options.output:
            sizes = {name: getattr(options, name) for name in SIZES}
            link = asdict(answer.link) if answer.link is not None else None
            record = {
                "environment": {**environment(), "ranks": bench.num_ranks, "load_averages": [load, os.getloadavg()[0]]},
                "sizes": sizes,
                "link": link,
                "costs": [asdict(each) for each in answer.costs],
                "rows": rows,
            }
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    distributed.destroy_process_group()


SIZES = {
    "layers": 8,
    "width": 320,
    "length": 256,
    "batch": 2,
    "chunks": 2,
    "microbatches": 8,
    "rounds": 2,
    "steps": 2,
}
"""Of the model and of the measurement."""

if __name__ == "__main__":
    main()
