"""Which tensors there are on a device, which a value holds, and of which plain ones a tensor consists.

What bytes are counted by is the storage, and not every tensor has one: a wrapper (a DTensor) holds other tensors, and a
sparse one its indices and values (`nn.Embedding(sparse=True)` has such gradients). What oneDNN has packed shows none.
"""

import gc
from collections.abc import Iterable, Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_COMPRESSED_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED_BY_COLUMN = (torch.sparse_csc, torch.sparse_bsc)


def existing_tensors(device_type: str) -> list[torch.Tensor]:
    """Return every tensor on a device type that Python holds now (a batch, a data set, buffers, parameters).

    What only reference cycles hold is freed first: nobody can use it, yet it would be counted as held.
    """
    gc.collect()
    kinds = _kinds(torch.Tensor) - _kinds(torch._subclasses.FakeTensor)
    held = [
        item
        for item in gc.get_objects()
        if type(item) in kinds  # there are hundreds of thousands of objects
        and not is_traceable_wrapper_subclass(item)  # the tensors inside stand by themselves
        and item.device.type == device_type
    ]
    return [part for item in held for part in inner_tensors(item)]


def _kinds(kind: type) -> set[type]:  # a class and all that derive from it
    return {kind}.union(*map(_kinds, kind.__subclasses__()))


def inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a tensor consists of: itself, a wrapper's (a DTensor's share), a sparse one's."""
    if is_traceable_wrapper_subclass(tensor):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in parts:  # a DTensor names its mesh, too
            if isinstance(part, torch.Tensor):
                yield from inner_tensors(part)
    elif tensor.layout == torch.strided:
        yield tensor
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _COMPRESSED_BY_ROW:
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in _COMPRESSED_BY_COLUMN:
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors' storages, each once; of wrappers those of the tensors inside."""
    plain = (part for tensor in tensors for part in inner_tensors(tensor))
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in plain}.values())


def flat_tensors(value: object) -> Iterable[torch.Tensor]:
    """Yield the tensors inside nested tuples, lists, mappings and dataclass-like outputs, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from flat_tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from flat_tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from flat_tensors(getattr(value, name))
