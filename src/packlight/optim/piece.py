"""Which rows of a DTensor are here, and tensors beside it that are cut as it is.

A DTensor says how it is cut by its mesh and its placements; a tensor with as many rows and the same placements is cut
where it is, on any number of processes, and torch.distributed.checkpoint saves and loads it as such.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Which rows of a parameter this process has, and how they are cut.

    Attributes:
        shape: of the whole parameter.
        local_shape: of what is here.
        mesh: the DTensor's device mesh; None for a whole that was put together.
        placements: the DTensor's.
        num_axes: how many leading axes count rows; the others are a row.
        origin: elements before the first one here, where the pieces are one after the other.
    """

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    mesh: Any
    placements: tuple[Any, ...]
    num_axes: int = 1
    origin: int = 0

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[self.num_axes :])

    @property
    def num_rows(self) -> int:
        """Rows that are here."""
        return math.prod(self.local_shape[: self.num_axes])

    @property
    def is_cut(self) -> bool:
        """Whether other processes have other rows, or rows at least lie so that they could."""
        return self.mesh is None or any(placement.is_shard() for placement in self.placements)

    def groups(self) -> tuple[Any, ...]:
        """Return the process groups whose members have different rows, one for each axis of the mesh that cuts."""
        return tuple(self.mesh.get_group(axis) for axis, each in enumerate(self.placements) if each.is_shard())

    def dtensor(self, local: Tensor, whole: tuple[int, ...], *, moved: int = 0, cut: bool = True) -> Tensor:
        """Return what is here of a tensor as a DTensor.

        Args:
            local: contiguous.
            whole: its whole shape.
            moved: by how many axes its rows are behind the parameter's.
            cut: as the parameter is; False: every process has it all.
        """
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor, Replicate

        placements = [_moved(each, moved) if cut else Replicate() for each in self.placements]
        stride = torch.empty(whole, device="meta").stride()
        made: Tensor = DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride
        )
        return made


class Cut(NamedTuple):
    """A matrix of which a piece is here.

    Attributes:
        rows: fp32, (2, rows here): row maxima, what the step found first; changed in place.
        cols: fp32, (2, columns): column maxima, the same way; changed in place.
        groups: the process groups that have the other pieces.
    """

    rows: Tensor
    cols: Tensor
    groups: tuple[Any, ...]


def piece_of(param: Any) -> Piece:
    """Return which rows of a DTensor are here."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements, shape = tuple(param.placements), tuple(param.shape)
    _, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, placements)
    num_axes = max((each.dim for each in placements if each.is_shard()), default=0) + 1
    origin = offsets[0] * math.prod(shape[1:]) if shape else 0
    return Piece(shape, tuple(local_of(param).shape), param.device_mesh, placements, num_axes, origin)


def is_dtensor(tensor: Any) -> bool:
    """Tell whether a tensor is a DTensor; where nobody has imported those, none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """Return what of a tensor is here; a plain one itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _moved(placement: Any, by: int) -> Any:
    """Return a placement for a tensor whose rows are so many axes behind."""
    if not by or not placement.is_shard():
        return placement
    options = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + by, **options)
