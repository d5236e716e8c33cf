"""Encode, decode and the optimiser steps on compactly stored moments, in plain PyTorch: the definition.

A step on 4-bit moments has to decode them, update them in fp32 and encode them again. Written with whole
tensors that costs several fp32 copies of the parameter at once, more than the compact states saved; and
torch.optim.AdamW can only work on moments of the parameter's own dtype. Here everything goes in ranges of the
flat, row-major parameter that start at multiples of 128, so block scales never straddle two of them, and
temporaries stay below 64 MiB for a tensor of any size.

Arithmetic is fp32, casts happen at load and store only. Each line is one rounded operation: the kernels do the
same operations in the same order, without fused multiply-adds, and give the same bits. The parameter is updated
with the moments as they are before they are rounded. A NaN or an infinity in a gradient goes through to the
parameter.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
algorithms 1, 2 and 3.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from packlight.numerics import moments
from packlight.numerics.chunks import read
from packlight.numerics.codes import square_root
from packlight.numerics.formats import BLOCK_ELEMENTS, MomentFormat
from packlight.numerics.moments import Moment, zero_moment
from packlight.numerics.rounding import Rounding, read_parameter, write_parameter
from packlight.numerics.second_moments import Factored, Matrix, Maxima, Rank1, second_moment
from packlight.numerics.settings import AdamWNumbers, SGDNumbers

CPU_CHUNK_ELEMENTS = 2**18
DEVICE_CHUNK_ELEMENTS = 2**20


class Noise(NamedTuple):
    """What is rounded at random, and by which bits.

    Attributes:
        key: of the random bits (`noise.key_at`).
        moments: round second moments at random.
    """

    key: int
    moments: bool


@torch.no_grad()
def adamw_step(
    param: Tensor,
    grad: Tensor,
    *,
    exp_avg: Moment,
    exp_avg_sq: Moment,
    numbers: AdamWNumbers,
    noise: Noise,
    rounding: Rounding,
) -> None:
    """Update a parameter and its stored moments in place.

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    p = (1 - lr wd) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps), with m and v as they are
    before they are rounded.

    Legend: p param, g grad, m exp_avg, v exp_avg_sq, t step, wd weight decay.

    Args:
        param: fp32, bf16 or fp16, any shape and strides: the parameter.
        grad: floating point, the same shape: its gradient; it is only read.
        exp_avg: the first moment.
        exp_avg_sq: the second moment.
        numbers: the constants of this step.
        noise: what is rounded at random.
        rounding: how the new parameter is rounded to its dtype.

    Source: Li et al. 2023, algorithms 1 and 3; Loshchilov, Hutter, "Decoupled Weight Decay Regularization",
        ICLR 2019, algorithm 2.
    """
    second = second_moment(exp_avg_sq)

    def gradients() -> Iterator[tuple[int, Tensor]]:
        for start, stop in _chunks(exp_avg_sq):
            p = read_parameter(param, start, stop, rounding)
            yield start, _gradient(p, grad, start, stop, numbers) * numbers.gradient_to_root

    second.prepare(gradients, beta2=numbers.beta2, root_beta2=numbers.root_beta2)
    for start, stop in _chunks(exp_avg):
        p = read_parameter(param, start, stop, rounding)
        g = _gradient(p, grad, start, stop, numbers)
        m = moments.load(exp_avg, start, stop, factor=numbers.beta1) + g * numbers.gradient_to_m
        v, root = second.decayed(start, g * numbers.gradient_to_root)
        p = p * numbers.decay - m / (root * numbers.root_to_denom + numbers.denom_eps)
        write_parameter(param, start, stop, p, rounding, key=noise.key)
        moments.store(exp_avg, start, m)
        second.store(start, v, root, key=noise.key if noise.moments else None)
    second.finish()


@torch.no_grad()
def sgd_step(
    param: Tensor,
    grad: Tensor,
    *,
    momentum_buffer: Moment | None,
    numbers: SGDNumbers,
    noise: Noise,
    rounding: Rounding,
) -> None:
    """Update a parameter and its stored momentum buffer in place.

    m = momentum m + (1 - dampening) g;  p = p - lr m, or p - lr (g + momentum m) with Nesterov's momentum, with
    m as it is before it is rounded.

    Legend: p param, g grad, m momentum_buffer.

    Args:
        param: fp32, bf16 or fp16, any shape and strides: the parameter.
        grad: floating point, the same shape: its gradient; it is only read.
        momentum_buffer: the moment; None: without momentum, m = g.
        numbers: the constants of this step.
        noise: the key of the random bits for the parameter's rounding.
        rounding: how the new parameter is rounded to its dtype.

    Source: Li et al. 2023, algorithm 2; the order of operations is torch.optim.SGD's.
    """
    for start, stop in _ranges(param.numel(), param.device):
        p = read_parameter(param, start, stop, rounding)
        g = read(grad, start, stop) * numbers.coefficient
        if numbers.l2:
            g = g + p * numbers.l2
        m = g
        if momentum_buffer is not None:
            m = moments.load(momentum_buffer, start, stop, factor=numbers.momentum) + g * numbers.gradient_to_m
        step = m * numbers.m_to_p
        if numbers.gradient_to_p:
            step = step + g * numbers.gradient_to_p
        write_parameter(param, start, stop, p - step, rounding, key=noise.key)
        if momentum_buffer is not None:
            moments.store(momentum_buffer, start, m)


@torch.no_grad()
def encode(
    values: Tensor,
    moment_format: MomentFormat,
    *,
    device: torch.device | str | None = None,
    gather: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Moment:
    """Store a tensor in a moment format, each element rounded to the nearest code.

    Args:
        values: floating point, any shape: the values to store.
        moment_format: how to store them.
        device: where to store them; None: where they are.
        gather: of a piece of a matrix: gets its row and column maxima, returns the largest of all pieces' row maxima
            and the column maxima of all pieces.

    Returns:
        The moment; its tensors are new.

    Source: Li et al. 2023, section 2 (blocks), algorithm 4 (rank-1).
    """
    moment = zero_moment(values.shape, moment_format, device=values.device if device is None else device)

    def ranges() -> Iterator[tuple[int, Tensor]]:
        for start, stop in _chunks(moment):
            yield start, read(values, start, stop).to(moment.device)

    second = second_moment(moment)
    if isinstance(second, Factored):
        second.prepare(lambda: ((start, square_root(part)) for start, part in ranges()), beta2=0.0, root_beta2=0.0)
    if isinstance(second, Matrix | Rank1):
        by_root = isinstance(second, Matrix)
        maxima = second.maxima if isinstance(second, Matrix) else Maxima(moment, moment.shape)
        for start, part in ranges():
            maxima.add(square_root(part) if by_root else part, start)
        if isinstance(second, Matrix):
            row, column = maxima.of_axes()
            largest_row, column = (None, column) if gather is None else gather(row, column)
            second.use(row, column, largest_row=largest_row)
        else:
            second.use(maxima)
    for start, part in ranges():
        second.store(start, part, part if moment_format.signed else square_root(part), key=None)
    second.keep() if isinstance(second, Matrix) else second.finish()
    return moment


@torch.no_grad()
def decode(moment: Moment, *, device: torch.device | str | None = None) -> Tensor:
    """Return the values of a stored moment, as a new tensor.

    Args:
        moment: the stored moment.
        device: where the result is wanted; None: where the moment is.

    Returns:
        fp32, the moment's shape: the values.
    """
    values = torch.empty(moment.shape, dtype=torch.float32, device=moment.device if device is None else device)
    second = second_moment(moment)
    for start, stop in _chunks(moment):
        values.view(-1)[start:stop] = second.load(start, stop)
    return values


def _gradient(p: Tensor, grad: Tensor, start: int, stop: int, numbers: AdamWNumbers) -> Tensor:
    g = read(grad, start, stop)
    return g * numbers.coefficient + p * numbers.l2 if numbers.l2 else g


def _chunks(moment: Moment) -> Iterator[tuple[int, int]]:
    row = moment.numel // moment.shape[0] if moment.format.scale == "rank1" else 1
    return _ranges(moment.numel, moment.device, unit=math.lcm(BLOCK_ELEMENTS, row))


def _ranges(numel: int, device: torch.device, *, unit: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Cut a flat tensor at multiples of 128 elements, and at ends of rows where that is possible."""
    limit = CPU_CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    size = limit // unit * unit or limit
    return ((start, min(start + size, numel)) for start in range(0, numel, size))
