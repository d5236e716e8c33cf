"""What the hooks themselves cost: an engine that keeps everything, and recomputation beside torch's own.

Both do no more than PyTorch does, so any difference is Python that runs at each save and each module. It is predicted
from a count of these calls, and measured twice: as the ratio of whole steps, and as the difference of steps on a single
token, which are nearly nothing but such calls.
"""

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import packlight
from benchmarks.activations_steps import (
    Record,
    Work,
    checkpoint_blocks,
    claim,
    compared,
    gpt,
    interleaved,
    peak_bytes,
    same,
)
from packlight.activations import Engine, find_blocks
from packlight.demo.train_gpt import Shape

MOST_RATIO = 1.02
SECONDS_PER_CALL = 2e-6  # of a Python function that looks a little around
TINY_ROUNDS = 100


def overhead(shape: Shape, *, batch: int, rounds: int) -> Record:
    """Time a step without an engine, and with one that keeps every site.

    Args:
        shape: of the GPT.
        batch: its windows.
        rounds: of the comparison.

    Returns:
        The record.
    """
    plain = gpt(shape, batch=batch)
    kept, hooked = plain.twin(), _hooked(plain.twin())
    counts = _counts(plain)
    with Engine(kept.model, {"*": "keep"}):
        exact = same(kept.results(), plain.results())
        works = {"no engine": plain, "engine keeps all": kept, "torch hooks that keep all": hooked}
        rows = compared(interleaved({name: work.step for name, work in works.items()}, rounds=rounds), "no engine")
        tiny = {name: _one_token(work).step for name, work in works.items()}
        spent = interleaved(tiny, rounds=TINY_ROUNDS, num_warm_up=10)
    medians = {name: statistics.median(each) for name, each in spent.items()}
    for row in rows:
        row["one_token_seconds"] = medians[row["contender"]]
    added_seconds = medians["engine keeps all"] - medians["no engine"]
    plain_seconds, ours = rows[0]["seconds"], rows[1]
    return {
        "shape": vars(shape) | {"batch": batch},
        **counts,
        "exact": exact,
        "predicted_ratio": 1 + counts["num_calls"] * SECONDS_PER_CALL / plain_seconds,
        "added_seconds_one_token": added_seconds,
        "added_seconds_per_call": added_seconds / counts["num_calls"],
        "ratio_from_one_token": 1 + added_seconds / plain_seconds,
        "rows": rows,
        "claims": [
            claim("an engine that keeps all / no engine, medians", ours["ratio"], MOST_RATIO),
            claim("the same, median of the rounds' ratios", ours["paired_ratio"], MOST_RATIO),
            claim("the same, from the cost on one token", 1 + added_seconds / plain_seconds, MOST_RATIO),
            claim("loss and every gradient bit-equal", float(exact), 1, at_least=True),
        ],
    }


def recomputation(shape: Shape, *, batch: int, rounds: int) -> Record:
    """Time packlight.recompute beside torch.utils.checkpoint, on the same blocks.

    Args:
        shape: of the GPT.
        batch: its windows.
        rounds: of the comparison.

    Returns:
        The record.
    """
    plain = gpt(shape, batch=batch)
    ours, theirs = plain.twin(), plain.twin()
    checkpoint_blocks(theirs.model)
    with packlight.recompute(ours.model):
        exact = same(ours.results(), plain.results()) and same(theirs.results(), plain.results())
        works = {"torch checkpoint": theirs, "packlight.recompute": ours, "nothing recomputed": plain}
        steps = {name: work.step for name, work in works.items()}
        rows = compared(interleaved(steps, rounds=rounds), "torch checkpoint")
        tiny = interleaved({name: _one_token(each).step for name, each in works.items()}, rounds=TINY_ROUNDS)
        for row in rows:
            row["one_token_seconds"] = statistics.median(tiny[row["contender"]])
            row["peak_bytes"] = peak_bytes(steps[row["contender"]])
    blocks = [block.path for block in find_blocks(plain.model)]
    return {
        "shape": vars(shape) | {"batch": batch},
        "blocks": blocks,
        "exact": exact,
        # One more forward, of the three parts that forward and backward are. Both do that, so between them: 1.
        "predicted_ratio": 1.0,
        "predicted_ratio_to_nothing_recomputed": 4 / 3,
        "ratio_to_nothing_recomputed": rows[1]["seconds"] / rows[2]["seconds"],
        "rows": rows,
        "claims": [
            claim("packlight.recompute / torch checkpoint, medians", rows[1]["ratio"], MOST_RATIO),
            claim("the same, median of the rounds' ratios", rows[1]["paired_ratio"], MOST_RATIO),
            claim("the same, of the bytes alive", rows[1]["peak_bytes"] / rows[0]["peak_bytes"], MOST_RATIO),
            claim("loss and every gradient bit-equal", float(exact), 1, at_least=True),
        ],
    }


def _one_token(work: Work) -> Work:
    return Work(work.model, work.inputs[:1, :1], work.targets[:1, :1], work.around)


def _hooked(work: Work) -> Work:
    """Let torch call two functions that do nothing: what any engine in Python pays at least."""
    return Work(work.model, work.inputs, work.targets, partial(saved_tensors_hooks, Tensor.detach, lambda kept: kept))


def _counts(work: Work) -> Record:
    """Count the saves and the calls of modules in one step, and the Python calls that an engine makes of them."""
    num_saves = num_calls = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal num_saves
        num_saves += 1
        return tensor

    def called(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    handles = [module.register_forward_hook(called) for path, module in work.model.named_modules() if path]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        work.model(work.inputs)
    for handle in handles:
        handle.remove()
    return {
        "num_saves": num_saves,
        "num_module_calls": num_calls,
        "num_calls": 2 * num_saves + 2 * num_calls,  # pack and unpack; before and after
        "predicted_seconds_per_call": SECONDS_PER_CALL,
        "num_parameters": sum(each.numel() for each in work.model.parameters()),
        "num_threads": torch.get_num_threads(),
    }
