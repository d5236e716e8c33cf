"""Encode, decode and the AdamW step on compactly stored moments, in plain PyTorch: the definition.

A step on 4-bit moments has to decode them, update them in fp32 and encode them again. Written with whole
tensors that costs several fp32 copies of the parameter at once, more than the compact states saved; and
torch.optim.AdamW can only work on moments of the parameter's own dtype. Here everything goes in chunks of the
flat, row-major parameter. A chunk is a multiple of 128 elements, so block scales never straddle two chunks,
and its temporaries stay below 64 MiB for a tensor of any size.

Rank-1 scales of the new second moment depend on the whole tensor, so that format takes two passes: the first
computes the new second moment chunk by chunk and keeps only its maxima per axis, the second computes it
again, updates the parameter with the moments before rounding, and encodes them. The old scales are replaced
after the last chunk.

Arithmetic is fp32, casts happen at load and store only. Nothing is clamped from below: an all-zero block, row
or column has scale 0 and decodes to zeros, and a NaN or an infinity goes through to the parameter.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
algorithms 1, 3, 4.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from packlight.numerics.chunks import read, write
from packlight.numerics.codes import nearest_codes, pack, unpacked_values
from packlight.numerics.formats import BLOCK_ELEMENTS, MomentFormat

CPU_CHUNK_ELEMENTS = 2**18
DEVICE_CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True)
class AdamWSettings:
    """The hyper-parameters of one step.

    Attributes:
        lr: learning rate.
        beta1: decay of the first moment per step.
        beta2: decay of the second moment per step.
        eps: added to the denominator.
        weight_decay: decay per unit of lr (decoupled), or the L2 factor added to the gradient.
        maximize: follow the gradient instead of its negative.
        decoupled: True for AdamW, False for Adam's L2 weight decay.
        grad_scale: the gradient is divided by it before anything else.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    maximize: bool = False
    decoupled: bool = True
    grad_scale: float = 1.0


@dataclass(frozen=True)
class Moment:
    """One moment as it is stored.

    Attributes:
        format: how it is stored.
        shape: the logical parameter's shape.
        codes: fp32, shape: the values themselves; or uint8, 1-D: two codes a byte, the low nibble is the even
            element.
        scales: fp32, 1-D each: one for blocks, one per axis for rank-1, none for fp32.
    """

    format: MomentFormat
    shape: tuple[int, ...]
    codes: Tensor
    scales: tuple[Tensor, ...] = ()

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Scale:
    """The scales of a flat tensor: element i has min(outer[i // span], inner[i % span]), or the outer one."""

    outer: Tensor
    inner: Tensor | None
    span: int

    def of_chunk(self, start: int, stop: int) -> Tensor:
        first = start // self.span
        outer = self.outer[first : -(-stop // self.span), None]
        scale = outer.expand(-1, self.span) if self.inner is None else torch.minimum(outer, self.inner)
        return scale.reshape(-1)[start - first * self.span : stop - first * self.span]

    def without_zeros(self) -> "_Scale":
        """Return the divisors: where a scale is 0 its elements are 0, and 0/1 encodes what 0/0 would not."""
        inner = None if self.inner is None else _zeros_to_ones(self.inner)
        return replace(self, outer=_zeros_to_ones(self.outer), inner=inner)


def _zeros_to_ones(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _scale_of(moment: Moment, scales: tuple[Tensor, ...]) -> _Scale:
    if moment.format.scale == "block":
        return _Scale(scales[0], None, moment.format.block_elements)
    axes = len(moment.shape) - 1
    spread = [vector.view([-1 if k == axis else 1 for k in range(axes)]) for axis, vector in enumerate(scales[1:])]
    inner = functools.reduce(torch.minimum, spread).reshape(-1)
    return _Scale(scales[0], inner, inner.numel())


def zero_moment(shape: Sequence[int], moment_format: MomentFormat, *, device: torch.device | str = "cpu") -> Moment:
    """Return a stored moment that decodes to zeros.

    Args:
        shape: the logical parameter's shape.
        moment_format: how to store it.
        device: where to store it.

    Returns:
        The moment; its tensors are new.
    """
    dtype = torch.float32 if moment_format.book is None else torch.uint8
    codes = torch.zeros(moment_format.codes_shape(shape), dtype=dtype, device=device)
    scales = tuple(
        torch.zeros(scale, device=device, dtype=torch.float32) for scale in moment_format.scale_shapes(shape)
    )
    return Moment(moment_format, tuple(shape), codes, scales)


@torch.no_grad()
def encode(values: Tensor, moment_format: MomentFormat, *, device: torch.device | str | None = None) -> Moment:
    """Store a tensor in a moment format.

    code(x) = the nearest book value's index to x / scale(x), the lower one of two equally near.

    Args:
        values: floating point, any shape: the values to store.
        moment_format: how to store them.
        device: where to store them; None: where they are.

    Returns:
        The moment; its tensors are new.

    Source: Li et al. 2023, section 2 (blocks), algorithm 4 (rank-1).
    """
    moment = zero_moment(values.shape, moment_format, device=values.device if device is None else device)
    maxima = _Maxima(moment)
    chunks = list(_chunks(moment))
    for start, stop in chunks if moment_format.scale == "rank1" else ():
        maxima.add(read(values, start, stop).to(moment.codes.device), start)
    scales = maxima.scales()
    for start, stop in chunks:
        _store(moment, start, read(values, start, stop).to(moment.codes.device), _divisor(moment, scales))
    _replace_scales(moment, scales)
    return moment


@torch.no_grad()
def decode(moment: Moment, *, device: torch.device | str | None = None) -> Tensor:
    """Return the values of a stored moment, as a new tensor.

    Args:
        moment: the stored moment.
        device: where the result is wanted; None: where the codes are.

    Returns:
        fp32, the moment's shape: the values.
    """
    device = moment.codes.device if device is None else device
    values = torch.empty(moment.shape, dtype=torch.float32, device=device)
    scale = _old_scale(moment)
    for start, stop in _chunks(moment):
        values.view(-1)[start:stop] = _load(moment, start, stop, scale)
    return values


@torch.no_grad()
def adamw_step(
    param: Tensor, grad: Tensor, *, exp_avg: Moment, exp_avg_sq: Moment, step: float, settings: AdamWSettings
) -> None:
    """Update a parameter and its stored moments in place.

    p *= 1 - lr wd;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
    p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps), with m and v as they are before they are
    rounded.

    Legend: p param, g grad, m exp_avg, v exp_avg_sq, t step, b1 beta1, b2 beta2, wd weight_decay.

    Args:
        param: fp32, bf16 or fp16, any shape and strides: the parameter.
        grad: fp32, bf16 or fp16, the same shape: its gradient; it is only read.
        exp_avg: the first moment.
        exp_avg_sq: the second moment.
        step: the number of this step, 1 for the first.
        settings: the hyper-parameters.

    Source: Li et al. 2023, algorithms 1 and 3; the order of operations is torch.optim.AdamW's.
    """
    chunks = list(_chunks(exp_avg_sq))
    old_m, old_v = _old_scale(exp_avg), _old_scale(exp_avg_sq)
    maxima = _Maxima(exp_avg_sq)
    for start, stop in chunks if exp_avg_sq.format.scale == "rank1" else ():
        g = _gradient(param, grad, start, stop, settings)
        maxima.add(_decay_square(_load(exp_avg_sq, start, stop, old_v), g, settings), start)
    new_scales = maxima.scales()
    new_divisor = _divisor(exp_avg_sq, new_scales)
    for start, stop in chunks:
        g = _gradient(param, grad, start, stop, settings)
        m = _load(exp_avg, start, stop, old_m).lerp_(g, 1 - settings.beta1)
        v = _decay_square(_load(exp_avg_sq, start, stop, old_v), g, settings)
        write(param, start, stop, _descend(read(param, start, stop), m, v, step=step, settings=settings))
        _store(exp_avg, start, m, None)
        _store(exp_avg_sq, start, v, new_divisor)
    _replace_scales(exp_avg_sq, new_scales)


def _gradient(param: Tensor, grad: Tensor, start: int, stop: int, settings: AdamWSettings) -> Tensor:
    g = read(grad, start, stop)
    if settings.grad_scale != 1.0:
        g = g / settings.grad_scale
    if settings.maximize:
        g = -g
    if settings.weight_decay != 0 and not settings.decoupled:
        g = g.add(read(param, start, stop), alpha=settings.weight_decay)
    return g


def _decay_square(v: Tensor, g: Tensor, settings: AdamWSettings) -> Tensor:
    return v.mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)


def _descend(p: Tensor, m: Tensor, v: Tensor, *, step: float, settings: AdamWSettings) -> Tensor:
    if settings.weight_decay != 0 and settings.decoupled:
        p.mul_(1 - settings.lr * settings.weight_decay)
    step_size = settings.lr / (1 - settings.beta1**step)
    denom = (v.sqrt() / (1 - settings.beta2**step) ** 0.5).add_(settings.eps)
    return p.addcdiv_(m, denom, value=-step_size)


def _chunks(moment: Moment) -> Iterator[tuple[int, int]]:
    """Cut a flat tensor at multiples of 128 elements, and at ends of rows where that is possible."""
    numel = moment.numel
    limit = CPU_CHUNK_ELEMENTS if moment.codes.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    unit = math.lcm(BLOCK_ELEMENTS, numel // moment.shape[0]) if moment.format.scale == "rank1" else BLOCK_ELEMENTS
    size = limit // unit * unit or limit
    return ((start, min(start + size, numel)) for start in range(0, numel, size))


class _Maxima:
    """Gathers the largest value per axis of a non-negative flat tensor that comes in chunks."""

    def __init__(self, moment: Moment) -> None:
        self.shape = moment.shape
        self.outer = self.inner = moment.codes.new_empty(0)
        if moment.format.scale == "rank1":
            self.outer = torch.zeros_like(moment.scales[0])
            self.inner = self.outer.new_zeros(math.prod(moment.shape[1:]))

    def add(self, values: Tensor, start: int) -> None:
        """Pad a chunk with zeros to whole rows, and take them in."""
        span = self.inner.numel()
        before, after = start % span, -(start + values.numel()) % span
        rows = (pad(values, (before, after)) if before or after else values).view(-1, span)
        outer = self.outer[start // span :][: rows.shape[0]]
        torch.maximum(outer, rows.amax(1), out=outer)
        torch.maximum(self.inner, rows.amax(0), out=self.inner)

    def scales(self) -> tuple[Tensor, ...]:
        """Return one vector per axis, or nothing where the format has no rank-1 scales."""
        if self.outer.numel() == 0:
            return ()
        inner = self.inner.view(self.shape[1:])
        axes = range(inner.dim())
        return (
            self.outer,
            *(inner.amax([k for k in axes if k != axis]) if len(axes) > 1 else inner for axis in axes),
        )


def _old_scale(moment: Moment) -> _Scale | None:
    return None if moment.format.book is None else _scale_of(moment, moment.scales)


def _divisor(moment: Moment, new_scales: tuple[Tensor, ...]) -> _Scale | None:
    return _scale_of(moment, new_scales).without_zeros() if new_scales else None


def _replace_scales(moment: Moment, new_scales: tuple[Tensor, ...]) -> None:
    for old, new in zip(moment.scales, new_scales, strict=False):
        old.copy_(new)


def _load(moment: Moment, start: int, stop: int, scale: _Scale | None) -> Tensor:
    """Return a chunk's values, fp32 1-D: the stored values themselves in fp32, else a new tensor."""
    if moment.format.book is None or scale is None:
        return moment.codes.view(-1)[start:stop]
    codes = moment.codes[start // 2 : (stop + 1) // 2]
    values = unpacked_values(codes, moment.format.book)[: stop - start]
    return values.mul_(scale.of_chunk(start, stop))


def _store(moment: Moment, start: int, values: Tensor, divisor: _Scale | None) -> None:
    """Encode a chunk; without a divisor take the block scales from the values and keep them."""
    stop = start + values.numel()
    if moment.format.book is None:
        write(moment.codes, start, stop, values)
        return
    if divisor is None:
        outer = _block_maxima(values, moment.format.block_elements)
        moment.scales[0][start // moment.format.block_elements :][: outer.numel()] = outer
        divisor = _Scale(outer, None, moment.format.block_elements).without_zeros()
        ratios = values / divisor.of_chunk(0, stop - start)
    else:
        ratios = values / divisor.of_chunk(start, stop)
    moment.codes[start // 2 : (stop + 1) // 2] = pack(nearest_codes(ratios, moment.format.book))


def _block_maxima(values: Tensor, block_elements: int) -> Tensor:
    tail = -values.numel() % block_elements
    return (pad(values, (0, tail)) if tail else values).view(-1, block_elements).abs().amax(1)
