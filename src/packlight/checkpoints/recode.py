"""One parameter's state, from the format that it has to another.

A state that has the wanted format is passed on as it is, bit for bit. Any other goes through fp32: its moments are
decoded one at a time into files (see `scratch`), and encoded from there to the nearest codes. So one moment in fp32 is
in memory, and what a kernel takes for its ranges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packlight.checkpoints.refusal import CheckpointError, refused
from packlight.checkpoints.scratch import Scratch
from packlight.checkpoints.states import Parameter, has_moments, is_of_other_library
from packlight.numerics import decode
from packlight.optim.checkpoint import Converter
from packlight.optim.layout import Layout, gathered_layout, layout_of
from packlight.optim.soundness import check_sound
from packlight.optim.state import State, step_tensor


@dataclass
class Recoder:
    """Recodes states of one kind of optimiser.

    Attributes:
        kind: of the optimiser.
        scratch: where tensors are made.
        num_rounded: how many states have been rounded anew, so far.
        num_error_bits: of how many states error bits were left out, so far.
    """

    kind: Converter
    scratch: Scratch
    num_rounded: int = 0
    num_error_bits: int = 0

    def moments_of(self, parameter: Parameter) -> tuple[str, ...]:
        """Return the names of the moments that a state has; SGD's has none without momentum."""
        return self.kind.moments if has_moments(parameter.state) else ()

    def portable(self, parameter: Parameter) -> State:
        """Return a state as torch's optimiser would hold it: step, where there is one, and fp32 moments.

        Raises:
            CheckpointError: the state lacks a tensor, has one of another size, or numbers that are not finite.
        """
        state, moments = parameter.state, self.moments_of(parameter)
        with refused(str(parameter), ValueError, KeyError):
            check_sound(state, "its state")
            if parameter.saved_format is not None:
                values = self._decoded(parameter, moments)
            elif not moments:
                values = {}
            elif set(state) - {"step"} == set(moments) and not is_of_other_library(state):
                values = {name: self._in_fp32(name, state[name]) for name in moments}
            else:
                values = self._of_other_library(parameter)
            self._check_step(state)
        for name, value in values.items():
            _check_values(parameter, name, value)
        step = {} if state.get("step") is None else {"step": step_tensor(state["step"])}
        return {**step, **values}

    def compact(self, parameter: Parameter, wanted: Layout) -> State:
        """Return a state in a layout.

        Raises:
            CheckpointError: as `portable`.
        """
        state, moments = parameter.state, self.moments_of(parameter)
        if parameter.saved_format is not None:
            saved = parameter.layout()
            if not moments or saved.has_tensors_of(wanted) or wanted.has_tensors_of(saved):
                return self._as_it_is(parameter, saved, wanted)
        portable: dict[str, Any] = {"step": step_tensor(1.0), **self.portable(parameter)}
        if wanted.state_format == "fp32":
            made = portable
        else:
            with refused(str(parameter)):
                made = wanted.from_portable(portable, moments=moments) if moments else portable
            self.num_rounded += 1
            self._check_stored(parameter, made)
        return (
            {key: self.scratch.keep(value) for key, value in made.items() if key not in portable}
            | {key: value for key, value in made.items() if key in portable}
            | self._error_bits(state, wanted)
        )

    def zeros(self, parameter: Parameter, layout: Layout | None, *, step: float) -> State:
        """Return the state of a parameter that has had no gradient, which decodes to zeros.

        Args:
            parameter: it.
            layout: how the state is to lie; None: as torch's.
            step: its step count.
        """
        counter = {"step": step_tensor(step)}
        if layout is None:
            return counter | {
                name: self.scratch.empty(parameter.known_shape, torch.float32) for name in self.kind.moments
            }
        like = torch.empty(parameter.known_shape, device="meta")
        made = layout.init_state(like, moments=self.kind.moments, device=torch.device("cpu"))
        return {key: self.scratch.keep(value) for key, value in made.items()} | counter

    def leave_error_bits(self, state: Mapping[str, Any]) -> None:
        """Note that a state's error bits, where it has any, are left out."""
        self.num_error_bits += "param_error" in state

    def _as_it_is(self, parameter: Parameter, saved: Layout, wanted: Layout) -> State:
        state, moments = parameter.state, self.moments_of(parameter)
        with refused(str(parameter), ValueError, KeyError):
            saved.stored(state, moments=moments)
            check_sound(state, "its state")
            self._check_step(state)
        if saved == wanted or not moments:
            return dict(state)
        shapes = _shapes(wanted, parameter, moments)
        made = {key: value.reshape(shapes[key]) for key, value in state.items() if key in shapes}
        return made | self._error_bits(state, wanted)

    def _error_bits(self, state: Mapping[str, Any], wanted: Layout) -> State:
        error = state.get("param_error")
        if not isinstance(error, Tensor):
            return {}
        if wanted.padded:
            self.leave_error_bits(state)
            return {}
        rows = () if wanted.piece is None else wanted.piece.shape[:1]
        return {"param_error": error.reshape(*rows, -1) if rows else error.reshape(-1)}

    def _decoded(self, parameter: Parameter, moments: tuple[str, ...]) -> State:
        layout = parameter.layout()
        stored = zip(moments, layout.stored(parameter.state, moments=moments), strict=True)
        made = {}
        for name, moment in stored:
            plain = moment.tensors.get("")
            if plain is not None:
                made[name] = plain.reshape(parameter.known_shape)
            else:
                made[name] = self.scratch.empty(parameter.known_shape, torch.float32)
                _put(decode(moment), made[name], layout)
        return made

    def _in_fp32(self, name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{name} came as {kind}, a floating-point tensor was wanted")
        if value.dtype == torch.float32 and value.is_contiguous():
            return value
        return self.scratch.empty(value.shape, torch.float32).copy_(value)

    def _of_other_library(self, parameter: Parameter) -> State:
        read = self.kind.read_state(parameter.state, shape=parameter.known_shape)
        return {key: self.scratch.keep(value) for key, value in read.items() if key != "step"}

    def _check_step(self, state: Mapping[str, Any]) -> None:
        step = state.get("step")
        if step is None and self.kind.moments != ("momentum_buffer",):
            raise CheckpointError(f"a state with {sorted(map(str, state))} came, one with a step count was wanted")
        if step is not None and not 0 <= float(step) < float("inf"):
            raise CheckpointError(f"a step count of {float(step)} came, a number from 0 on was wanted")

    def _check_stored(self, parameter: Parameter, made: Mapping[str, Tensor]) -> None:
        with refused(f"{parameter}, encoded"):
            check_sound(made, "its state")


def wanted_layout(shape: Sequence[int], state_format: str, *, in_rows: bool) -> Layout:
    """Return how a state in a format lies.

    Args:
        shape: the parameter's.
        state_format: a format's name.
        in_rows: as for torch.distributed.checkpoint, where any number of processes cuts it.

    Raises:
        CheckpointError: such a format cannot be cut.
    """
    with refused("the wanted format"):
        if in_rows:
            return gathered_layout(tuple(shape), state_format)
        return layout_of(torch.empty(tuple(shape), device="meta"), state_format)


def state_bytes(parameter: Parameter, layout: Layout | None, moments: Sequence[str]) -> int:
    """Return the bytes of a parameter's state in a layout (None: as torch's); where the shape is not known, 0."""
    if parameter.shape is None:
        return 0
    if layout is None:
        return 4 + 4 * len(moments) * torch.Size(parameter.shape).numel()
    return layout.state_bytes(torch.float32, moments=moments)


def _shapes(wanted: Layout, parameter: Parameter, moments: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a state's tensors in a layout."""
    like, meta = torch.empty(parameter.known_shape, device="meta"), torch.device("meta")
    return {key: tuple(each.shape) for key, each in wanted.init_state(like, moments=moments, device=meta).items()}


def _put(values: Tensor, target: Tensor, layout: Layout) -> None:
    """Copy decoded values where they belong, without the rows' padding."""
    if layout.padded:
        assert layout.piece is not None
        width = layout.piece.width
        target.view(-1, width).copy_(values.view(-1, layout.padded)[:, :width])
    else:
        target.copy_(values.view(target.shape))


def _check_values(parameter: Parameter, name: str, values: Tensor) -> None:
    with refused(str(parameter)):
        check_sound({name: values}, "its state")
