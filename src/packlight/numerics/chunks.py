"""Ranges of a tensor in row-major order, whatever its strides are.

An optimiser step in chunks reads and writes the elements start:stop of the logical, row-major parameter.
`tensor.view(-1)` gives them only where the tensor is contiguous, and `tensor.reshape(-1)` copies a
channels_last weight or a transposed gradient as a whole, which for the largest parameter is just the
temporary that chunks are there to avoid.

A range of a row-major tensor is the end of one row, some whole rows and the beginning of one more, and the
parts of rows are ranges again, of tensors with one axis less. So a range is a few strided views, and only its
own elements are ever copied.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def _views(tensor: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """Yield views that, one after the other, are the elements start:stop in row-major order."""
    if tensor.is_contiguous():
        yield tensor.view(-1)[start:stop]
    elif tensor.dim() == 1:
        yield tensor[start:stop]
    elif start < stop:
        row_elements = tensor.numel() // tensor.shape[0]
        row, inside = divmod(start, row_elements)
        if inside or stop - start < row_elements:
            end = min(stop - row * row_elements, row_elements)
            yield from _views(tensor[row], inside, end)
            yield from _views(tensor, row * row_elements + end, stop)
        else:
            last = stop // row_elements
            yield tensor[row:last]
            yield from _views(tensor, last * row_elements, stop)


def read(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return a range of a tensor's elements, counted in row-major order.

    Args:
        tensor: floating point, any shape and strides.
        start: first element.
        stop: one past the last element.

    Returns:
        fp32, (stop - start,): a view of a contiguous fp32 tensor, else a copy of just these elements.
    """
    views = list(_views(tensor, start, stop))
    flat = views[0].reshape(-1) if len(views) == 1 else torch.cat([view.reshape(-1) for view in views])
    return flat.float()


def write(tensor: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Store a range of a tensor's elements; nothing is done where `values` is the view that `read` gave.

    Args:
        tensor: floating point, any shape and strides; changed in place.
        start: first element.
        stop: one past the last element.
        values: fp32, (stop - start,): the new elements.
    """
    shared = values.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    if shared and values.storage_offset() == tensor.storage_offset() + start and tensor.is_contiguous():
        return
    done = 0
    for view in _views(tensor, start, stop):
        view.copy_(values[done : done + view.numel()].view(view.shape))
        done += view.numel()
