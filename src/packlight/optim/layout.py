"""How a parameter and its state lie for the kernels, also where other processes have parts of the parameter.

Under FSDP2 a parameter is a DTensor: each process has some of its rows (of its first axis), and how many hangs on the
number of processes. A state whose blocks crossed rows could not be cut and put together otherwise, and a plain tensor
in a state is taken for the same on all processes: torch.distributed.checkpoint would write one process's codes for
all. The idea: no block crosses a row, so codes and scales are DTensors of as many rows, cut where the parameter is.

    a row is whole blocks    that is how the whole parameter's state lies, too: same bits on any number of processes
    it is not                each row is padded with zeros to whole blocks, in a copy that lives for the step
    norms, biases, small     fp32 moments, cut as the parameter is

What a row's blocks are hangs on nothing but the whole parameter's shape. So a state can be saved by some processes and
loaded by any other number, without a bit being changed. Maxima of a matrix's columns are of all rows: see `settle`.
A parameter that is cut along a later axis has its rows there, and no matrix; one that is cut along its last axis has
no rows, and keeps its moments in fp32, as a warning says.
"""

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from packlight.numerics import Moment, MomentFormat, decode, encode, moment_formats
from packlight.numerics.formats import (
    BLOCK_ELEMENTS,
    MATRIX_PIECE,
    PIECE_FORMATS,
    ROOT_BLOCKS,
    ROOT_MATRIX,
    matrix_view,
)
from packlight.numerics.noise import seed_at
from packlight.optim import state as states
from packlight.optim.piece import Piece, is_dtensor, local_of, piece_of
from packlight.optim.state import MOMENTS, MOMENTUM, State, state_keys, stored_moments

CUT_FORMATS = frozenset({"4bit", "8bit", "fp8"})
"""The formats whose states can be cut; fp32 ones need no thought."""

# The longer names first: one begins like the other.
_NAMES = (*sorted(MOMENTS, key=len, reverse=True), *MOMENTUM)


@dataclass(frozen=True)
class Layout:
    """How a parameter's state lies.

    Attributes:
        shape: in which the kernels see the parameter, or the piece of it that is here.
        state_format: the name of the state's format; of a piece as `formats.PIECE_FORMATS` has it.
        piece: what of a DTensor is here; None for a plain tensor.
        padded: elements of a row for the kernels, where rows are padded; 0 elsewhere.
        skipped: elements that the kernels see before the first one, where what is here does not begin with a block, and
            is rounded at random: so each element gets the bits that it has in the whole parameter.
    """

    shape: tuple[int, ...]
    state_format: str
    piece: Piece | None = None
    padded: int = 0
    skipped: int = 0

    def rounded_at_random(self) -> "Layout":
        """Return the layout of a parameter in 16 bits that is rounded at random."""
        begins_within = self.state_format == "fp32" and self.piece is not None and self.piece.is_cut
        return replace(self, skipped=self._origin() % BLOCK_ELEMENTS) if begins_within else self

    # One part: see `flat.Flat`, which has several

    @property
    def parts(self) -> "tuple[Layout, ...]":
        """What the kernels see as parameters."""
        return (self,)

    def part_state(self, state: State, _part: "Layout") -> State:
        """Return the share of a state that a part has."""
        return state

    def is_complete(self, state: Mapping[str, Tensor], moments: tuple[str, ...]) -> bool:
        """Tell whether a state has all tensors that it is to have."""
        return "step" in state and all(key in state for key in self.keys(moments))

    # Parameters and gradients

    def view(self, tensor: Tensor) -> Tensor:
        """Return what of a parameter or a gradient is here, in the kernels' shape where that takes no copy."""
        if self.piece is None:
            return tensor
        if tensor.placements != self.piece.placements:  # type: ignore[attr-defined]
            tensor = tensor.redistribute(self.piece.mesh, self.piece.placements)  # type: ignore[attr-defined]
        local = local_of(tensor)
        return local.view(self.shape) if local.is_contiguous() and not self.padded else local

    def needs_copy(self, local: Tensor) -> bool:
        """Tell whether the kernels get copies of what `view` returned."""
        return self.piece is not None and (self.padded > 0 or self.skipped > 0 or not local.is_contiguous())

    def copied(self, local: Tensor) -> Tensor:
        """Return a copy of what `view` returned, or of a state's tensor like it, padded with zeros for the kernels."""
        assert self.piece is not None
        if self.skipped:
            return pad(local.reshape(-1), (self.skipped, 0))
        rows = local.reshape(self.piece.num_rows, self.piece.width)
        whole = pad(rows, (0, self.padded - self.piece.width)) if self.padded else rows.clone()
        return whole.view(self.shape)

    def put_back(self, local: Tensor, copied: Tensor) -> None:
        """Copy a parameter back from what `copied` returned."""
        local.copy_(copied[self.skipped :].view(local.shape) if self.skipped else self._trimmed(copied))

    def if_piece(self) -> "Layout | None":
        """Return this, None where the parameter is a plain tensor."""
        return None if self.piece is None else self

    def seed(self, seed: int) -> int:
        """Return the seed of the random bits of what is here, from the whole parameter's."""
        return seed if self.piece is None or not self.piece.is_cut else seed_at(seed, self._origin() - self.skipped)

    # States

    def state_bytes(self, dtype: torch.dtype, *, moments: Sequence[str] = MOMENTS, rounding: str = "nearest") -> int:
        """Return the bytes that the state takes here; see `state.state_bytes`."""
        return states.state_bytes(self.shape, dtype, self.state_format, moments=moments, rounding=rounding)

    def init_state(
        self, param: Tensor, *, moments: Sequence[str] = MOMENTS, rounding: str = "nearest", device: Any = None
    ) -> State:
        """Return the state of a parameter that has not had a step; see `state.init_state`."""
        like = torch.empty(self.shape, dtype=param.dtype, device="meta")
        where = device or local_of(param).device
        made = states.init_state(like, self.state_format, moments=moments, rounding=rounding, device=where)
        return self._dressed(made)

    def keys(self, moments: tuple[str, ...] = MOMENTS) -> tuple[str, ...]:
        """Return the keys of the moments' tensors, in the order of the kernels."""
        return state_keys(self.state_format if moments else "", self.shape, moments)

    def tensors(self, state: Mapping[str, Tensor], keys: Sequence[str]) -> tuple[Tensor, ...]:
        """Return tensors of a state in the shapes of the kernels."""
        return tuple([state[key] if self.piece is None else self._bare(key, state[key]) for key in keys])

    def stored(self, state: Mapping[str, Tensor], *, moments: Sequence[str] = MOMENTS) -> tuple[Moment, ...]:
        """Return the moments of a state; see `state.stored_moments`."""
        return stored_moments(self.bare(state), self.shape, self.state_format, moments=moments)

    def to_portable(
        self, state: Mapping[str, Tensor], *, moments: Sequence[str] = MOMENTS, device: Any = None
    ) -> State:
        """Return a state as torch's optimiser would hold it; see `state.to_portable`.

        A DTensor's moments are DTensors like it, and stay where they are: its mesh says where that is.
        """
        if self.piece is None:
            options: Any = {"shape": self.shape, "state_format": self.state_format}
            return states.to_portable(state, moments=moments, device=device, **options)
        values = (self._trimmed(decode(moment)) for moment in self.stored(state, moments=moments))
        made = {name: self._as_parameter(value) for name, value in zip(moments, values, strict=True)}
        return {"step": states.step_tensor(state["step"]), **made}

    def from_portable(
        self, portable: Mapping[str, Any], *, moments: Sequence[str] = MOMENTS, device: Any = None
    ) -> State:
        """Return the state of this layout that a portable one stands for.

        All processes that have rows of the parameter do it at once.

        Raises:
            ValueError: as `state.from_portable`; or a moment is not a DTensor that is cut as the parameter is.
        """
        if self.piece is None:
            return states.from_portable(portable, state_format=self.state_format, moments=moments, device=device)
        states.check_portable(portable, moments)
        made = {"step": states.step_tensor(portable["step"])}
        formats = moment_formats(self.state_format, self.shape) if moments else ()
        for name, each in zip(moments, formats, strict=False):
            local = local_of(self._checked(name, portable[name]))
            values = self.copied(local) if self.padded else local.reshape(self.shape)
            moment = encode(values, each, device=device, gather=self._gather if each.deferred else None)
            made |= {states.moment_key(name, suffix): tensor for suffix, tensor in moment.tensors.items()}
        return self._dressed(made)

    def bare(self, state: Mapping[str, Tensor]) -> State:
        """Return a state in the kernels' shapes; it shares the tensors."""
        return dict(state) if self.piece is None else {key: self._bare(key, each) for key, each in state.items()}

    def has_tensors_of(self, other: "Layout") -> bool:
        """Tell whether states have the same tensors in both layouts, but for how they are cut."""
        if self == other:
            return True
        (first, second), (one, two) = (moment_formats(each.state_format, each.shape) for each in (self, other))
        return other.piece is None and not self.padded and first == one and replace(second, deferred=False) == two

    def copied_state(self, state: Mapping[str, Tensor], device: torch.device) -> State:
        """Return a copy of a state of this layout on a device; of DTensors where they are."""
        if self.piece is None:
            return {key: value.to(device, copy=True) for key, value in state.items()}
        return {key: each.clone() for key, each in state.items()}

    def _gather(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        from packlight.optim.settle import gathered  # imports torch.distributed

        assert self.piece is not None
        return gathered(row, column, self.piece.groups())

    def _checked(self, key: str, value: Any) -> Tensor:
        """Return a tensor from elsewhere, if it is a DTensor on our mesh."""
        assert self.piece is not None
        if self.piece.mesh is not None and not (is_dtensor(value) and value.device_mesh == self.piece.mesh):
            came = f"a DTensor on {value.device_mesh}" if is_dtensor(value) else f"a {type(value).__name__}"
            raise ValueError(
                f"{key} came as {came} for a parameter that is a DTensor on {self.piece.mesh}, the same was wanted. "
                "Load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict."
            )
        return value  # type: ignore[no-any-return]

    # DTensors of what kernels see, and back

    def _dressed(self, state: State) -> State:
        """Return a state of the kernels' tensors as DTensors, but for `step`."""
        if self.piece is None:
            return state
        return {key: each if key == "step" else self._dtensor(key, each) for key, each in state.items()}

    def _dtensor(self, key: str, tensor: Tensor) -> Tensor:
        assert self.piece is not None
        piece, axes, suffix = self.piece, self.piece.num_axes, _suffix(key)
        if not piece.is_cut or suffix == "cols":
            return piece.dtensor(tensor, tuple(tensor.shape), cut=False)
        if suffix == "" or self.state_format == "fp32":
            return self._as_parameter(tensor.view(piece.local_shape))
        lead, here = piece.shape[:axes], piece.local_shape[:axes]
        if suffix == "rows":
            per_row = self._rows_per_row()
            return piece.dtensor(tensor.view(2, *here, per_row), (2, *lead, per_row), moved=1)
        per_row = self._per_row(key, suffix)
        return piece.dtensor(tensor.view(*here, per_row), (*lead, per_row))

    def _bare(self, key: str, tensor: Tensor) -> Tensor:
        """Return what is here of a state's tensor, in the kernels' shape."""
        if key == "step":
            return tensor
        local, suffix = local_of(self._checked(key, tensor)), _suffix(key)
        if suffix in ("rows", "cols"):
            return local.reshape(2, local.numel() // 2)
        return local.reshape(self.shape) if suffix == "" else local.reshape(-1)

    def _as_parameter(self, local: Tensor) -> Tensor:
        assert self.piece is not None
        return self.piece.dtensor(local, self.piece.shape)

    def _trimmed(self, local: Tensor) -> Tensor:
        assert self.piece is not None
        if self.padded:
            local = local.view(-1, self.padded)[:, : self.piece.width]
        return local.reshape(self.piece.local_shape)

    def _origin(self) -> int:
        assert self.piece is not None
        return self.piece.origin // max(1, self.piece.width) * (self.padded or self.piece.width)

    def _per_row(self, key: str, suffix: str) -> int:
        """Return how many numbers of a state's tensor a row has."""
        assert self.piece is not None
        width = self.padded or self.piece.width
        if suffix == "error":
            return width
        first, second = moment_formats(self.state_format, self.shape)
        (size,), _ = (second if key.startswith("exp_avg_sq") else first).tensors((width,))[suffix]
        return size

    def _rows_per_row(self) -> int:
        """Return how many rows of the matrix a row of the parameter is."""
        assert self.piece is not None
        return (self.padded or self.piece.width) // self.shape[-1]


def layout_of(param: Tensor, state_format: str) -> Layout:
    """Return how the state of a parameter lies.

    Args:
        param: plain, or a DTensor that is not a partial sum.
        state_format: a key of `numerics.FORMATS`.

    Raises:
        ValueError: a DTensor is cut that is to have one of the published formats, whose scales are of whole tensors.
    """
    if not is_dtensor(param):
        return Layout(tuple(param.shape), state_format)
    piece = piece_of(param)
    return _of_piece(piece, state_format) if piece.is_cut else Layout(piece.shape, state_format, piece)


def gathered_layout(shape: tuple[int, ...], state_format: str, rows: tuple[int, ...] | None = None) -> Layout:
    """Return how the state of `rows` (all) of a parameter lies that was cut, on no mesh; errors are `layout_of`'s."""
    return _of_piece(Piece(shape, shape if rows is None else rows, None, ()), state_format)


def _of_piece(piece: Piece, state_format: str) -> Layout:
    moments = moment_formats(state_format, piece.shape)
    if moments[1] is ROOT_MATRIX and piece.num_axes > 1:
        moments = moments[0], ROOT_BLOCKS
    name = PIECE_FORMATS.get(moments)
    if name is None:
        raise ValueError(
            f"state format {state_format!r} came for a parameter of shape {piece.shape} that is cut over processes, "
            "and its scales are of whole tensors; '4bit', '8bit', 'fp8' or 'fp32' was wanted"
        )
    width = -(-piece.width // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
    if name != "fp32" and sum(_row_bytes(each, width) for each in moments) >= 8 * piece.width:
        _warn_short(piece.shape, piece.width)
        name = "fp32"
    if name == "fp32":
        return Layout(piece.local_shape, name, piece)
    padded, shape = (width if width != piece.width else 0), (piece.num_rows, width)
    if name == MATRIX_PIECE and padded:
        name = name if matrix_view((piece.shape[0], piece.width)) else "4bit/blocks"
    elif name == MATRIX_PIECE:
        _, columns = matrix_view(piece.shape) or shape
        shape = piece.num_rows * (piece.width // columns), columns
    return Layout(shape, name, piece, padded)


def _row_bytes(moment: MomentFormat, width: int) -> int:
    sizes = moment.tensors((width,)).items()
    return sum(math.prod(size) * dtype.itemsize for suffix, (size, dtype) in sizes if suffix not in ("rows", "cols"))


def _suffix(key: str) -> str:
    """Return what a key of a state adds to the moment's name: exp_avg_sq_codes has "codes"."""
    if key == "param_error":
        return "error"
    name = next(name for name in _NAMES if key.startswith(name))
    return key[len(name) + 1 :]


@functools.cache
def _warn_short(shape: tuple[int, ...], width: int) -> None:
    warnings.warn(
        f"a parameter of shape {shape} is cut over processes into rows of {width} elements, too short for blocks of "
        f"{BLOCK_ELEMENTS}: its moments stay in fp32. Cut it along its first axis, or name 'fp32' for it.",
        stacklevel=2,
    )
