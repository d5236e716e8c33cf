"""Column maxima of matrices that are cut over processes: each has found those of its rows, and all need all rows'.

A step on a piece of a matrix leaves the maxima that it found (`second_moments`). Divisors are the same as the whole
matrix's if the column maxima are the largest of all pieces', and if rows know the largest maximum of all rows. Both are
maxima, so whatever the order in which processes are asked, the bits are the whole's: 4 bytes a column are all that
sharded states send. All matrices of a step go together in one message:

    1 the columns' maxima of each matrix, and the largest of its rows'   2 the largest of all processes'   3 `rotate`

They are compared as the bits of non-negative numbers, as the kernels do it, so that a NaN is larger than everything.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from packlight.numerics.moments import UNKNOWN_COLUMN, UNKNOWN_ROW
from packlight.numerics.second_moments import is_usable, largest_of, rotate
from packlight.optim.piece import Cut


def settle(cuts: Iterable[Cut], *, skipped: Tensor | bool = False) -> None:
    """Take over what a step found in pieces of matrices; all processes that have pieces call it.

    Args:
        cuts: the matrices, in the same order on all processes.
        skipped: one element: the step was not done, and nothing changes.
    """
    together: dict[tuple[str, ...], list[Cut]] = {}
    for cut in cuts:
        together.setdefault(tuple(group.group_name for group in cut.groups), []).append(cut)
    for each in together.values():
        _settle(each, skipped=skipped)


def gathered(row: Tensor, column: Tensor, groups: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return what all pieces of a matrix have found.

    Args:
        row: fp32, (rows here,): row maxima.
        column: fp32, (columns,): column maxima of the rows here.
        groups: the process groups that have the other pieces.

    Returns:
        The largest of all usable row maxima, 0-dim; the column maxima of all rows.
    """
    both = _reduced(torch.cat([column, largest_of(row)[None]]), groups)
    return both[-1], both[:-1]


def _settle(cuts: Sequence[Cut], *, skipped: Tensor | bool) -> None:
    vectors, num = [each.rows for each in cuts] + [each.cols for each in cuts], len(cuts)
    sizes = [each.shape[1] for each in vectors]
    for cut in cuts:
        if not cut.rows.shape[1]:  # no kernel has looked at it
            cut.cols[0].zero_()
    flat = torch.cat(vectors, 1)
    owners = torch.repeat_interleave(torch.tensor(sizes)).to(flat.device)
    num_rows, found = sum(sizes[:num]), flat[0].clone()
    most = _most(found, owners, 2 * num)
    both = _reduced(torch.cat([found[num_rows:], most[:num]]), cuts[0].groups)
    found[num_rows:], most = both[:-num], torch.cat([both[-num:], _most(both[:-num], owners[num_rows:] - num, num)])
    unknown = torch.full_like(found, UNKNOWN_ROW)
    unknown[num_rows:] = UNKNOWN_COLUMN
    before = flat.clone()
    rotate(flat, found, most[owners], unknown=unknown)
    done = torch.where(torch.as_tensor(skipped, device=flat.device).reshape(()).bool(), before, flat)
    for vector, new in zip(vectors, done.split(sizes, 1), strict=True):
        vector.copy_(new)


def _most(found: Tensor, owners: Tensor, num: int) -> Tensor:
    """Return the largest usable maximum of each owner, 0 where there is none."""
    usable = torch.where(is_usable(found), found, 0.0)
    return torch.zeros(num, device=found.device).scatter_reduce_(0, owners, usable, "amax")


def _reduced(maxima: Tensor, groups: Sequence[Any]) -> Tensor:
    bits = maxima.abs().view(torch.int32)
    for group in groups:
        distributed.all_reduce(bits, distributed.ReduceOp.MAX, group=group)
    return bits.view(torch.float32)
