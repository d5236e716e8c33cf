"""What both optimiser steps take: many parameters, flat lists of their states, and this step's constants.

The states are in the order of `MomentFormat.tensors`, for each parameter exp_avg, then exp_avg_sq. Kernels get
addresses, so everything that comes is checked here, before any of it is used.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from packlight.numerics import reference
from packlight.numerics.formats import MomentFormat, moment_formats
from packlight.numerics.moments import Moment
from packlight.numerics.noise import key_at
from packlight.numerics.reference import Noise
from packlight.numerics.rounding import ERROR_DTYPES, Rounding, RoundingName
from packlight.numerics.settings import AdamWNumbers, SGDNumbers

SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] errors, Tensor numbers, Tensor step, "
    "Tensor? found_inf, int[] seeds, str state_format, bool stochastic, str rounding) -> ()"
)
"""Of the operators, whose arguments are the fields of `Call`."""
MUTATED = ("params", "states", "errors")


class Slot(NamedTuple):
    """One parameter's step.

    Attributes:
        param: the parameter; changed in place.
        grad: its gradient.
        moments: exp_avg and exp_avg_sq, a momentum buffer or nothing; changed in place.
        rounding: how the parameter is rounded.
        key: of its random bits.
    """

    param: Tensor
    grad: Tensor
    moments: tuple[Moment, ...]
    rounding: Rounding
    key: int

    def adamw_step(self, numbers: AdamWNumbers, *, stochastic: bool) -> None:
        """Do the reference's step."""
        exp_avg, exp_avg_sq = self.moments
        reference.adamw_step(
            self.param,
            self.grad,
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            numbers=numbers,
            noise=Noise(self.key, stochastic),
            rounding=self.rounding,
        )

    def sgd_step(self, numbers: SGDNumbers) -> None:
        """Do the reference's step."""
        reference.sgd_step(
            self.param,
            self.grad,
            momentum_buffer=self.moments[0] if self.moments else None,
            numbers=numbers,
            noise=Noise(self.key, False),
            rounding=self.rounding,
        )


class Call(NamedTuple):
    """The arguments of an optimiser step.

    Attributes:
        params: fp32, bf16 or fp16, any shapes: the parameters, all of one dtype; changed in place.
        grads: the same shapes: their gradients.
        states: the tensors of their moments; changed in place; none for SGD without momentum.
        errors: int8 or int16, one per parameter: error bits, for roundings that have them; changed in place.
        numbers: fp32, (10,) or (6,): `AdamWNumbers` or `SGDNumbers`.
        step: fp32, 0-dim: this step's number, 1 for the first.
        found_inf: fp32, one element: nothing is done unless it is 0.
        seeds: of the parameters' random bits (`noise.seed_of`).
        state_format: a format's name; "" for SGD without momentum.
        stochastic: round second moments at random; first moments and momentum are rounded to nearest.
        rounding: how parameters are rounded (`rounding.RoundingName`).
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Tensor]
    errors: Sequence[Tensor]
    numbers: Tensor
    step: Tensor
    found_inf: Tensor | None
    seeds: Sequence[int]
    state_format: str
    stochastic: bool
    rounding: str

    @property
    def device(self) -> torch.device:
        """Return where the parameters are."""
        return self.params[0].device if self.params else self.numbers.device

    def is_skipped(self) -> bool:
        """Return whether `found_inf` forbids the step; waits for the device."""
        return self.found_inf is not None and float(self.found_inf) != 0

    def moments(self, num_moments: int) -> Iterator[tuple[Moment, ...]]:
        """Yield the moments of each parameter, checked.

        Args:
            num_moments: of each parameter, where the format is not "".

        Raises:
            ValueError: a gradient, state or tensor of error bits does not belong to its parameter.
        """
        self._check_errors()
        tensors = iter(self.states)
        for param, grad in zip(self.params, self.grads, strict=True):
            shape = tuple(param.shape)
            if grad.shape != param.shape or grad.device != param.device:
                raise ValueError(
                    f"a gradient of shape {tuple(grad.shape)} on {grad.device} came for a parameter of shape {shape} "
                    f"on {param.device}, the same ones were wanted"
                )
            chosen = moment_formats(self.state_format, shape)[:num_moments] if self.state_format else ()
            yield tuple(_moment(each, param, tensors) for each in chosen)

    def slots(self, num_moments: int) -> list[Slot]:
        """Return the parameters one by one; waits for the device to know the step's number.

        Args:
            num_moments: of each parameter, where the format is not "".

        Raises:
            ValueError: as `moments`.
        """
        step = int(self.step)
        name: RoundingName = self.rounding  # type: ignore[assignment]
        return [
            Slot(
                self.params[at],
                self.grads[at],
                moments,
                Rounding(name, self.errors[at] if self.errors else None),
                key_at(self.seeds[at], step),
            )
            for at, moments in enumerate(self.moments(num_moments))
        ]

    def _check_errors(self) -> None:
        bf16 = bool(self.params) and self.params[0].dtype == torch.bfloat16
        wanted = ERROR_DTYPES.get(self.rounding) if bf16 else None
        if len(self.errors) != (0 if wanted is None else len(self.params)):
            raise ValueError(
                f"{len(self.params)} parameters came with {len(self.errors)} tensors of error bits for rounding "
                f"{self.rounding!r}; bf16 ones have one each under {', '.join(ERROR_DTYPES)}, and none otherwise. "
                "Choose the rounding when the optimiser is built."
            )
        for param, error in zip(self.params, self.errors, strict=False):
            if (error.numel(), error.dtype, error.device) != (param.numel(), wanted, param.device) or (
                not error.is_contiguous()
            ):
                raise ValueError(
                    f"error bits of {error.numel()} elements, {error.dtype}, on {error.device} came for a parameter "
                    f"of shape {tuple(param.shape)} on {param.device}, contiguous {wanted} were wanted. Remove the "
                    "parameter's state after changing its shape, and load states after moving the model."
                )


def _moment(moment_format: MomentFormat, param: Tensor, tensors: Iterator[Tensor]) -> Moment:
    moment, shape = {}, tuple(param.shape)
    for suffix, (size, dtype) in moment_format.tensors(shape).items():
        tensor = moment[suffix] = next(tensors)
        if (tensor.shape, tensor.dtype, tensor.device) != (size, dtype, param.device) or not tensor.is_contiguous():
            raise ValueError(
                f"a state tensor {suffix!r} of {tensor.dtype}, shape {tuple(tensor.shape)}, on {tensor.device} came "
                f"for a parameter of shape {shape} on {param.device}, contiguous {dtype}, shape {size} was wanted. "
                "Remove the parameter's state after changing its shape or its device, and leave states to "
                "load_state_dict."
            )
    return Moment(moment_format, shape, moment)
