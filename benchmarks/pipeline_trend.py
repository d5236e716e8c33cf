"""Claim: simulated pipelines show the published trend of PipeOffload's figure 15: what fits, in which order, how fast.

Wan et al., "PipeOffload" (arXiv 2503.01328), trained a GPT of 10.5 billion parameters on 8 A100 with 80 GB by six
schedules at three lengths, and plotted model FLOPs utilisation and activation memory. Here the same schedules are
simulated with the paper's constants, 220 Tflop/s for products and 15 GB/s for copies each way.

What the figure does not say is taken from the authors' script (examples/pretrain_offload.sh in
sail-sg/zero-bubble-pipeline-parallelism): 3 d - 2 layers, which with the embedding and the head as slots of their own
make three chunks of one layer on each rank, and 8 heads of keys and values. Width and microbatches are not in it: 6144
and 32 are assumed, which with all heads alike would come to 10.5 billion parameters, and with 8 of keys and values to
9.2. Parameters, gradients and states take 16 bytes each on top of what the figure calls activations.

    python benchmarks/pipeline_trend.py --output benchmarks/results/simulated/pipeline_trend.json
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from packlight.pipeline.copies import Tier, place
from packlight.pipeline.line import Lines
from packlight.pipeline.schedule import Schedule, grouped, interleaved, one_f_one_b, uniform
from packlight.pipeline.shapes import Rates, Shape, stage_costs
from packlight.pipeline.simulate import StageCost, simulate

NUM_RANKS, NUM_CHUNKS, NUM_MICROBATCHES, NUM_LAYERS, WIDTH = 8, 3, 32, 22, 6144
SHAPE = Shape("10.5B", NUM_LAYERS + 2, WIDTH, 48, 8, 4 * WIDTH, 50257, is_gated=False, has_dropout=True)
FLOPS, PEAK_FLOPS, COPY_RATE, HOP_RATE = 220e12, 312e12, 15e9, 100e9
DEVICE_BYTES, STATE_BYTES = 80e9, 16

SCHEDULES: dict[str, tuple[Callable[[], Schedule], int]] = {
    "1F1B-I": (lambda: interleaved(NUM_RANKS, NUM_CHUNKS, NUM_MICROBATCHES), 0),
    "GIS": (lambda: grouped(NUM_RANKS, NUM_CHUNKS, NUM_MICROBATCHES, group_size=NUM_RANKS), 0),
    "GIS-H": (lambda: grouped(NUM_RANKS, NUM_CHUNKS, NUM_MICROBATCHES, group_size=NUM_RANKS // 2), 0),
    "PO-H": (lambda: uniform(NUM_RANKS, NUM_CHUNKS, NUM_MICROBATCHES), 2),
    "PO-F": (lambda: uniform(NUM_RANKS, NUM_CHUNKS, NUM_MICROBATCHES), 3),
    "1F1B": (lambda: one_f_one_b(NUM_RANKS, NUM_MICROBATCHES), 0),
}
"""How each is made, and how many of a rank's chunks move."""

PUBLISHED: dict[int, dict[str, tuple[int, int] | None]] = {
    4096: {"1F1B-I": (65, 15), "GIS": (65, 13), "GIS-H": (63, 8), "PO-H": (59, 3), "1F1B": (57, 12)},
    16384: {
        "1F1B-I": (63, 49),
        "GIS": (65, 34),
        "GIS-H": (64, 25),
        "PO-H": (62, 10),
        "PO-F": (58, 5),
        "1F1B": (55, 33),
    },
    32768: {"1F1B-I": None, "GIS": None, "GIS-H": (62, 51), "PO-H": (63, 20), "PO-F": (60, 8)},
}
"""By length and schedule: utilisation in percent, and activations in GB; None where memory ran out."""


@dataclass(frozen=True)
class Row:
    """One run, simulated and published (None: it ran out of memory)."""

    length: int
    schedule: str
    utilisation: float
    activation_gigabytes: float
    fits: bool
    published_utilisation: int | None
    published_gigabytes: int | None


def costs_of(num_stages: int, length: int) -> list[StageCost]:
    """Cost stages of slots: the first has the embedding, which costs next to nothing, the last one the head."""
    nothing = StageCost(0.0, 0.0, 0.0)
    head_seconds = 2 * length * SHAPE.embedding_parameters / FLOPS
    layer = stage_costs(SHAPE, NUM_LAYERS + 2, Rates(FLOPS, HOP_RATE), sequence_length=length)[1]
    head = StageCost(head_seconds, head_seconds, head_seconds)
    slots = [nothing, *[layer] * NUM_LAYERS, head]
    per_stage = len(slots) // num_stages
    stages = [slots[at * per_stage : (at + 1) * per_stage] for at in range(num_stages)]
    return [
        StageCost(
            *(sum(getattr(slot, name) for slot in each) for name in SECONDS),
            held_bytes=sum(slot.movable_bytes for slot in each),
            movable_bytes=sum(slot.movable_bytes for slot in each),
            hop_seconds=layer.hop_seconds,
        )
        for each in stages
    ]


SECONDS = ("forward_seconds", "input_seconds", "weight_seconds")


def run(name: str, length: int) -> Row:
    """Simulate one run."""
    make, num_moved = SCHEDULES[name]
    schedule = make()
    timed = simulate(schedule, costs_of(schedule.num_stages, length))
    tier, lines = Tier(COPY_RATE, COPY_RATE), Lines(timed)
    moved = [range(rank, num_moved * NUM_RANKS, NUM_RANKS) for rank in range(NUM_RANKS)]
    peak = max(place(lines.line(rank), moved[rank], tier).peak_bytes for rank in range(NUM_RANKS))
    tokens = NUM_MICROBATCHES * length
    flops = 3 * tokens * (NUM_LAYERS * SHAPE.layer_flops(length) + 2 * SHAPE.embedding_parameters)
    parameters = NUM_LAYERS * SHAPE.layer_parameters + 2 * SHAPE.embedding_parameters
    published = PUBLISHED[length][name]
    return Row(
        length=length,
        schedule=name,
        utilisation=100 * flops / (timed.seconds * NUM_RANKS * PEAK_FLOPS),
        activation_gigabytes=peak / 1e9,
        fits=peak + STATE_BYTES * parameters / NUM_RANKS <= DEVICE_BYTES,
        published_utilisation=published[0] if published else None,
        published_gigabytes=published[1] if published else None,
    )


def main() -> None:
    """Simulate every published run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    rows = [run(name, length) for length, each in PUBLISHED.items() for name in each]
    table = Table(title="simulated / published")
    for title in ("tokens", "schedule", "utilisation", "activations", "fits"):
        table.add_column(title, justify="right")
    for row in rows:
        ran = row.published_gigabytes is not None
        table.add_row(
            str(row.length),
            row.schedule,
            f"{row.utilisation:.0f} / {row.published_utilisation if ran else '-'} %",
            f"{row.activation_gigabytes:.0f} / {row.published_gigabytes if ran else '-'} GB",
            f"{'yes' if row.fits else 'no'} / {'yes' if ran else 'no'}",
        )
    Console().print(table)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
