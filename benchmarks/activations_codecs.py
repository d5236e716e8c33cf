"""What each codec saves, costs and changes, on the demo's GPT.

Time and bytes of a step, the error of its gradients at the initial and at trained weights, and the held-out loss after
training of a smaller GPT with the same seeds, beside training without a codec.

    bytes    = those without a codec - floats that the engine may round * (1 - bytes an element / 4)
    seconds >= those without a codec + the same elements * seconds to encode and decode one
"""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional

import packlight
from benchmarks.activations_steps import (
    Record,
    Work,
    compared,
    gpt,
    interleaved,
    peak_bytes,
    relative_error,
    seconds,
)
from packlight.activations.compress import CODECS
from packlight.demo.train_gpt import (
    GPT,
    Shape,
    draw_batch,
    evaluate,
    make_optimizer,
    make_schedule,
    next_byte_loss,
    read_text,
)
from packlight.numerics.group_operators import MASK, decode, encode
from packlight.planner.held import find_groups
from packlight.planner.profile import profile

PLAIN = "no codec"
LOSS_TOLERANCE = 0.005  # as in quality.py
RATE_ELEMENTS, RATE_ROUNDS = 2**22, 9
EVALUATED_WINDOWS = 64


@dataclass(frozen=True)
class Training:
    """What is trained to compare losses.

    Attributes:
        shape, batch: of the GPT.
        num_steps: of training.
        seeds: of weights and batches.
    """

    shape: Shape
    batch: int
    num_steps: int
    seeds: Sequence[int]


def compress(shape: Shape, *, batch: int, rounds: int, training: Training) -> Record:
    """Measure every codec.

    Args:
        shape: of the GPT whose steps are measured.
        batch: its windows.
        rounds: of the comparison of seconds.
        training: what losses are compared on.

    Returns:
        The record.
    """
    steps = _steps(shape, batch=batch, rounds=rounds)
    return {"shape": vars(shape) | {"batch": batch}, **steps, "claims": [], "training": _trainings(training)}


def _steps(shape: Shape, *, batch: int, rounds: int) -> Record:
    plain = gpt(shape, batch=batch)
    exact, encodable_bytes = plain.results(), _encodable_bytes(plain)
    works, engines = {PLAIN: plain}, []
    for codec in CODECS:
        works[codec] = plain.twin()
        engines.append(packlight.compress(works[codec].model, codec))
    rows = compared(interleaved({name: work.step for name, work in works.items()}, rounds=rounds), PLAIN)
    for row in rows:
        work = works[row["contender"]]
        row["peak_bytes"] = peak_bytes(work.step)
        row["peak_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
        row["gradient_error"] = relative_error(work.results()[1:], exact[1:])
    for row in rows[1:]:
        row |= _predicted(row["contender"], rows[0], encodable_bytes)
    for engine in engines:
        engine.remove()
    return {"encodable_bytes": encodable_bytes, "rows": rows}


def _encodable_bytes(work: Work) -> int:
    """Add up the storages that the engine rounds, by a profile on fake tensors."""

    def loss(logits: Tensor, _: object) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), work.targets.flatten())

    step = profile(work.model, work.inputs, None, loss=loss)
    rounded = [group for group in find_groups(step) if group.can_encode and not group.exact]
    return sum(step.storages[group.storage].num_bytes for group in rounded)


def _predicted(codec: str, plain: Record, encodable_bytes: int) -> Record:
    """Predict bytes and seconds from the codec's alone; a mask encodes nothing of this model."""
    flat = torch.randn(RATE_ELEMENTS)
    parts = encode(flat, codec)
    bytes_per_element = sum(part.nbytes for part in parts) / RATE_ELEMENTS

    def there_and_back() -> None:
        decode(encode(flat, codec), codec, RATE_ELEMENTS, torch.float32)

    per_element = statistics.median(seconds(there_and_back) for _ in range(RATE_ROUNDS)) / RATE_ELEMENTS
    elements = 0 if codec == MASK else encodable_bytes // 4
    peak = plain["peak_bytes"] - round(elements * (4 - bytes_per_element))
    added_seconds = elements * per_element
    return {
        "bytes_per_element": bytes_per_element,
        "seconds_per_element": per_element,
        "predicted_peak_ratio": peak / plain["peak_bytes"],
        "predicted_ratio": 1 + added_seconds / plain["seconds"],
    }


def _trainings(training: Training) -> Record:
    runs = []
    for seed in training.seeds:
        for codec in (None, *CODECS):
            torch.manual_seed(seed)
            model = GPT(training.shape)
            loss = _trained(model, codec, seed=seed, training=training)
            runs.append({"codec": codec or PLAIN, "seed": seed, "held_out_loss": loss})
            if codec is None and seed == training.seeds[0]:
                errors = _errors(model, training)
    return {
        "shape": vars(training.shape) | {"batch": training.batch},
        "num_steps": training.num_steps,
        "runs": runs,
        "summary": [_summary(codec, runs) for codec in (PLAIN, *CODECS)],
        "gradient_errors_after_training": errors,
    }


def _trained(model: GPT, codec: str | None, *, seed: int, training: Training) -> float:
    """Train as the demo does, and return the loss on its held-out text, without a codec."""
    generator = torch.Generator().manual_seed(seed)
    text, held_out = read_text()
    optimizer = make_optimizer(model)
    schedule = make_schedule(optimizer, num_steps=training.num_steps)
    with _engine(model, codec):
        for _ in range(training.num_steps):
            drawn = draw_batch(text, generator, batch=training.batch, context=training.shape.context)
            loss = next_byte_loss(model, *drawn)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return evaluate(model, held_out, batch=EVALUATED_WINDOWS, context=training.shape.context)


@contextlib.contextmanager
def _engine(model: nn.Module, codec: str | None) -> Iterator[None]:
    if codec is None:
        yield
        return
    with packlight.compress(model, codec):
        yield


def _errors(model: GPT, training: Training) -> dict[str, float]:
    """Measure the error of one gradient at trained weights, by codec."""
    model.train()
    drawn = draw_batch(
        read_text()[0], torch.Generator().manual_seed(2**31), batch=training.batch, context=training.shape.context
    )
    exact, errors = Work(model, *drawn).results()[1:], {}
    for codec in CODECS:
        with packlight.compress(model, codec):
            errors[codec] = relative_error(Work(model, *drawn).results()[1:], exact)
    return errors


def _summary(codec: str, runs: Sequence[Record]) -> Record:
    """Compare a codec with none, on the same seeds."""
    ours, plain = (
        {run["seed"]: run["held_out_loss"] for run in runs if run["codec"] == name} for name in (codec, PLAIN)
    )
    change = fmean(ours.values()) / fmean(plain.values()) - 1
    return {
        "codec": codec,
        "mean": fmean(ours.values()),
        "change": change,
        "paired_changes": [ours[seed] / plain[seed] - 1 for seed in sorted(ours)],
        "no_codec_lowest": min(plain.values()),
        "no_codec_highest": max(plain.values()),
        "within_tolerance": abs(change) <= LOSS_TOLERANCE,
    }
