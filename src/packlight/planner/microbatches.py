"""Splits a batch: gradients of microbatches add up to those of the batch, and one holds a part of the activations.

PyTorch leaves to each loop how a batch is split, and nobody tells before what that would spare. Here a step over a part
of the batch is profiled with the gradients that have gathered by then, and planned for like any other:

    plan        1 for each number of microbatches: profile the largest part, with gradients that stay; solve
                2 take the fastest plan
    training    3 for part, share in handle.microbatches(batch): (loss of part * share).backward()

Sums come in another order, and what is computed over a batch (batch norm) over a part of it, so it is no exact choice.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from packlight.budget import BudgetError
from packlight.planner.cost import Cost, StepCost
from packlight.planner.outcome import beside_plain
from packlight.planner.program import LOSS_SHARE
from packlight.records import Plan
from packlight.step import Profile


def num_rows(batch: Any) -> int:
    """Return the rows of a batch: what most of its tensors have in their first dimension; 0 where it has none."""
    lengths = [len(leaf) for leaf in tree_leaves(_plainly(batch)) if isinstance(leaf, Tensor) and leaf.dim()]
    return max(lengths, key=lengths.count, default=0)


def _plainly(batch: Any) -> Any:
    """Return a batch as containers that pytree knows; a tokeniser's is a mapping of its own."""
    return dict(batch) if isinstance(batch, Mapping) else batch


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
    if num == 1 or not rows:
        yield batch, 1.0
        return
    size = math.ceil(rows / num)
    for start in range(0, rows, size):
        part = tree_map_only(Tensor, functools.partial(_cut, rows=rows, start=start, size=size), _plainly(batch))
        yield part, min(size, rows - start) / rows


def _cut(tensor: Tensor, *, rows: int, start: int, size: int) -> Tensor:
    return tensor[start : start + size] if tensor.dim() and len(tensor) == rows else tensor


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
    found, errors, whole = list[tuple[float, Profile, Plan]](), list[BudgetError](), None
    for position, (num, step) in enumerate(steps):
        whole = whole or step
        try:
            made = solver(step)
            if step is not whole:
                made = beside_plain(replace(made, num_microbatches=num), _plain(whole))
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
