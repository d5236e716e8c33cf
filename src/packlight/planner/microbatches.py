"""Splits a batch: gradients of microbatches add up to those of the batch, and one holds a part of the activations.

PyTorch leaves to each loop how a batch is split, and nobody tells before what that would spare. Here a step over a part
of the batch is profiled with the gradients that have gathered by then, and planned for like any other:

    plan        1 for each number of microbatches: profile the largest part, with gradients that stay; solve
                2 take the fastest plan
    training    3 for part, share in handle.microbatches(batch): (loss of part * share).backward()

Sums come in another order, and what is computed over a batch (batch norm) over a part of it, so it is no exact choice.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from packlight.budget import BudgetError
from packlight.planner.cost import Cost, StepCost
from packlight.planner.outcome import beside_plain
from packlight.planner.program import LOSS_SHARE
from packlight.planner.timeline import flat_tensors
from packlight.records import Plan
from packlight.step import Profile


def num_rows(batch: Any) -> int:
    """Return the rows of a batch: what most of its tensors have in their first dimension; 0 where it has none."""
    lengths = [len(tensor) for tensor in flat_tensors(batch) if tensor.dim()]
    return max(lengths, key=lengths.count, default=0)


def numbers(batch: Any, most: int) -> list[int]:
    """Return the numbers of microbatches to try: powers of two, no more than rows.

    Raises:
        ValueError: fewer than one is allowed.
    """
    if most < 1:
        raise ValueError(f"max_microbatches={most} came; wanted 1 (the batch stays whole) or more")
    limit = max(1, min(most, num_rows(batch)))
    return [2**power for power in range(int(math.log2(limit)) + 1)]


def split(batch: Any, num: int) -> Iterator[tuple[Any, float]]:
    """Yield the microbatches of a batch, the largest first, each with its share of the rows.

    Args:
        batch: a mapping, a tuple or one tensor; tensors with as many rows as most are split (views, no copies), all
            else goes along whole.
        num: of microbatches; fewer where there are fewer rows.
    """
    rows = num_rows(batch)
    size = max(1, math.ceil(rows / num))
    for start in range(0, max(1, rows), size):
        stop = min(rows, start + size)
        yield _part(batch, rows, start, stop), (stop - start) / rows if rows else 1.0


def _part(value: Any, rows: int, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.dim() and len(value) == rows else value
    if isinstance(value, Mapping):
        return {name: _part(item, rows, start, stop) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_part(item, rows, start, stop) for item in value)
    return value


def fastest_split(steps: Iterable[tuple[int, Profile]], solver: Callable[[Profile], Plan]) -> tuple[Profile, Plan]:
    """Choose among numbers of microbatches (steps 1 and 2).

    Args:
        steps: a number and the step's profile with it, the whole batch first; read as far as they are needed.
        solver: makes a plan.

    Returns:
        The profile and the fastest plan; a split has to be faster by a share of a step's time.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that would.
    """
    found, errors, plain = list[tuple[float, Profile, Plan]](), list[BudgetError](), None
    for position, (num, step) in enumerate(steps):
        plain = plain or _plain(step)
        try:
            made = beside_plain(replace(solver(step), num_microbatches=num), plain)
        except BudgetError as error:
            errors.append(error)
            continue
        found.append((max(1.0, made.estimate.slowdown) * (1 + LOSS_SHARE * position), step, made))
        if made.estimate.slowdown <= 1:
            break
    if not found:
        least = min(errors, key=lambda each: each.smallest_bytes or math.inf)
        raise least
    _, step, made = min(found, key=lambda each: each[0])
    return step, made


def _plain(step: Profile) -> Cost:
    return StepCost(step).price((), step.optimizers[0] if step.optimizers else None)
