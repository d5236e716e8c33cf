"""Splits a batch: gradients of microbatches add up to those of the batch, and one holds a part of the activations.

PyTorch leaves to each loop how a batch is split, and nobody tells before what that would spare. Here a step over a part
of the batch is profiled with the gradients that have gathered by then, and planned for like any other:

    plan        1 for each number of microbatches: profile the largest part, with gradients that stay; solve
                2 take the fastest plan
    training    3 for part, share in handle.microbatches(batch): (loss of part * share).backward()

Gradients add up where a loss is a mean over rows (not over those tokens that count, of which parts have different
numbers). Sums come in another order, and what is computed over a batch (batch norm) over a part of it, so it is no
exact choice.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from packlight.budget import BudgetError, least_of
from packlight.planner.cost import StepCost
from packlight.planner.outcome import beside_plain, plain_cost
from packlight.planner.profile import ProfileError
from packlight.planner.program import rated
from packlight.records import Plan
from packlight.step import Profile

NOT_SPLIT = (
    "the batch stays whole: exact=True excludes microbatches, it has fewer than two rows, or there is no one length "
    "that most of its tensors have in their first dimension"
)


def num_rows(batch: Any) -> int:
    """Return the rows of a batch: what most of its tensors have in their first dimension; 0 where that is not clear."""
    lengths = [len(leaf) for leaf in tree_leaves(_plainly(batch)) if isinstance(leaf, Tensor) and leaf.dim()]
    most = sorted(set(lengths), key=lengths.count, reverse=True)[:2]
    is_clear = len(most) == 1 or (len(most) == 2 and lengths.count(most[0]) > lengths.count(most[1]))
    return most[0] if is_clear else 0


def _plainly(batch: Any) -> Any:
    """Return a batch as containers that pytree knows; a tokeniser's is a mapping of its own."""
    return tree_map(lambda leaf: _plainly(dict(leaf)) if isinstance(leaf, Mapping) else leaf, batch)


def numbers(batch: Any, most: int) -> list[int]:
    """Return the numbers of microbatches to try: powers of two, none that leaves one row alone beside larger parts.

    Raises:
        ValueError: fewer than one is allowed.
    """
    if most < 1:
        raise ValueError(f"max_microbatches={most} came; wanted 1 (the batch stays whole) or more")
    rows = num_rows(batch)
    limit = max(1, min(most, rows))
    powers = [2**power for power in range(int(math.log2(limit)) + 1)]
    return [num for num in powers if num == 1 or rows % num == 0 or rows // num > 1]


def split(batch: Any, num: int) -> Iterator[tuple[Any, float]]:
    """Yield the microbatches of a batch, the larger ones first, each with its share of the rows.

    Args:
        batch: a mapping, a tuple or one tensor; tensors with as many rows as most are split (views, no copies), all
            else goes along whole.
        num: of microbatches; fewer where there are fewer rows.
    """
    rows = num_rows(batch)
    if num == 1 or not rows:
        yield batch, 1.0
        return
    num, start, plain = min(num, rows), 0, _plainly(batch)
    for number in range(num):
        size = rows // num + (number < rows % num)
        yield tree_map_only(Tensor, functools.partial(_cut, rows=rows, start=start, size=size), plain), size / rows
        start += size


def _cut(tensor: Tensor, *, rows: int, start: int, size: int) -> Tensor:
    return tensor[start : start + size] if tensor.dim() and len(tensor) == rows else tensor


def fastest_split(
    tried: Sequence[int], step_of: Callable[[int], Profile], solver: Callable[[Profile], Plan]
) -> tuple[Profile, Plan]:
    """Choose among numbers of microbatches (steps 1 and 2).

    Args:
        tried: the numbers, 1 first; those after the first at which nothing needs to be slower are left out.
        step_of: profiles a step with so many.
        solver: makes a plan.

    Returns:
        The profile and the fastest plan; a split has to be faster by a share of a step's time.

    Raises:
        BudgetError: nothing fits; it names the smallest budget that would.
        ProfileError: the whole batch cannot be traced; a part that cannot is left out, with a note.
    """
    whole = step_of(1)
    plain = functools.cache(lambda: plain_cost(StepCost(whole)))
    found, errors, notes = list[tuple[float, Profile, Plan]](), list[BudgetError](), list[str]()
    for position, num in enumerate(tried):
        try:
            step = whole if num == 1 else step_of(num)
            made = solver(step)
        except BudgetError as error:
            errors.append(error)
            continue
        except ProfileError as error:
            notes.append(f"not in {num} microbatches: {str(error).splitlines()[0]}")
            continue
        made = made if num == 1 else beside_plain(replace(made, num_microbatches=num), plain())
        found.append((rated(made.estimate.slowdown, position), step, made))
        if made.estimate.slowdown <= 1:
            break
    if not found:
        least = least_of(errors)
        raise least
    smallest = [made.smallest_budget_bytes for _, _, made in found] + [at.smallest_bytes for at in errors]
    _, step, made = min(found, key=lambda each: each[0])
    least_bytes = min(each for each in smallest if each is not None)
    return step, replace(made, smallest_budget_bytes=least_bytes, notes=(*made.notes, *notes))
