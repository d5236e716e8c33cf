"""Stored moments, block by block: load a range of elements, store a range of elements.

A step works on ranges of the flat, row-major parameter that start at multiples of 128, so a block never
straddles two of them. Where blocks are scaled alone, this file is all there is to a moment; scales that hang on
rows and columns are in `second_moments`.

A decoded value is multiplied by the scale, and in a step by the moment's decay. Both are folded into one number
per block here, as kernels do, so the reference rounds where they round. Block scales of zero, and those too
small for a reciprocal, code everything as zero's neighbour and decode to zeros; a NaN or an infinity makes its
whole block NaN at the next step, so it shows. So does a finite gradient whose square is infinite: an infinite scale
would otherwise hold the block's parameters where they are, as m / inf = 0, without a sign of it.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from packlight.numerics import codes as coding
from packlight.numerics.chunks import write
from packlight.numerics.formats import MomentFormat
from packlight.numerics.noise import uniforms

# Below it 256 / scale would not be finite.
SMALLEST_SCALE = 2.0**-118
# Levels of a root are counted against a number just below 16 or 256, so that rounding never makes one more.
LEVEL_SLACK = 2.0**-16
# What rows and columns without a usable maximum are divided by: the other's maximum decides, or neither.
UNKNOWN_ROW, UNKNOWN_COLUMN = 1.0, 1e30


@dataclass(frozen=True)
class Moment:
    """One moment as it is stored.

    Attributes:
        format: how it is stored.
        shape: the logical parameter's shape.
        tensors: by suffix, as `MomentFormat.tensors` lists them.
    """

    format: MomentFormat
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Return where it is stored."""
        return next(iter(self.tensors.values())).device


def zero_moment(shape: Sequence[int], moment_format: MomentFormat, *, device: torch.device | str = "cpu") -> Moment:
    """Return a stored moment that decodes to zeros.

    Args:
        shape: the logical parameter's shape.
        moment_format: how to store it.
        device: where to store it.

    Returns:
        The moment; its tensors are new.
    """
    tensors = {
        suffix: torch.zeros(size, dtype=dtype, device=device)
        for suffix, (size, dtype) in moment_format.tensors(shape).items()
    }
    if moment_format.scale == "matrix":
        tensors["rows"].fill_(UNKNOWN_ROW)
        tensors["cols"].fill_(UNKNOWN_COLUMN)
    return Moment(moment_format, tuple(shape), tensors)


def levels_of(moment_format: MomentFormat) -> float:
    """Return the levels of a root format that its scale stands for: just below 2^bits."""
    return 2.0**moment_format.bits * (1 - LEVEL_SLACK)


def load(moment: Moment, start: int, stop: int, *, factor: float = 1.0) -> Tensor:
    """Return a range of a block-scaled moment, times a factor.

    Args:
        moment: coding "fp32", "book", "softsign" or "expanded", scale "block" or "none".
        start: first element, a multiple of 128.
        stop: one past the last.
        factor: an fp32 number.

    Returns:
        fp32, (stop - start,): a new tensor.
    """
    if moment.format.coding == "fp32":
        return moment.tensors[""].view(-1)[start:stop] * factor
    scale = _scales(moment, start, stop) * factor
    return _ratios(moment, start, stop) * _spread(scale, moment, stop - start)


def root_levels(moment: Moment, start: int, stop: int) -> Tensor:
    """Return the levels of a range of a root-coded moment.

    Args:
        moment: coding "root".
        start: first element, a multiple of 128.
        stop: one past the last.

    Returns:
        fp32, (stop - start,): code + 1, in units that `root_units` gives.
    """
    return _codes(moment, start, stop).float().add_(1)


def root_units(moment: Moment, start: int, stop: int, *, factor: float = 1.0) -> Tensor:
    """Return what a level is worth in each element of a range of a root-coded moment, times a factor.

    Args:
        moment: coding "root".
        start: first element, a multiple of 128.
        stop: one past the last.
        factor: folded with the number of levels into one fp32 number.

    Returns:
        fp32, (stop - start,): a new tensor.
    """
    units = _scales(moment, start, stop) * (factor / levels_of(moment.format))
    return _spread(units, moment, stop - start)


def store_roots(moment: Moment, start: int, roots: Tensor, *, key: int | None = None) -> None:
    """Encode a range of a root-coded moment, and its block scales.

    Args:
        moment: coding "root".
        start: first element, a multiple of 128.
        roots: fp32, 1-D: square roots of the elements, divided by row and column scales where there are any.
        key: of the random bits for stochastic rounding; None: nearest.
    """
    scale, inverse = _block_scales(moment, start, roots, span=levels_of(moment.format))
    _set_blocks(moment, "scale", start, scale)
    noise = None if key is None else uniforms(key, start, start + roots.numel(), device=roots.device)
    _set_codes(moment, start, coding.root_codes(roots * _spread(inverse, moment, roots.numel()), noise))


def store(moment: Moment, start: int, values: Tensor, *, key: int | None = None) -> None:
    """Encode a range of a block-scaled moment, and its scales.

    Args:
        moment: coding "fp32", "book", "softsign" or "expanded", scale "block" or "none".
        start: first element, a multiple of 128.
        values: fp32, 1-D: the elements from there on.
        key: of the random bits for stochastic rounding ("expanded" only); None: nearest.
    """
    if moment.format.coding == "fp32":
        write(moment.tensors[""], start, start + values.numel(), values)
        return
    book = moment.format.book
    scale, inverse = _block_scales(moment, start, values, span=1.0 if book is None else book.span)
    _set_blocks(moment, "scale", start, scale)
    ratios = values * _spread(inverse, moment, values.numel())
    if moment.format.coding == "expanded":
        _store_expanded(moment, start, values, ratios, key)
    else:
        codes = coding.softsign_codes(ratios) if book is None else coding.nearest_codes(ratios, book)
        _set_codes(moment, start, codes)


def _store_expanded(moment: Moment, start: int, values: Tensor, ratios: Tensor, key: int | None) -> None:
    numel = values.numel()
    blocks = _as_blocks(moment, values).abs()
    ignored = blocks == 0  # a signed zero has a code; an unsigned one needs the whole range below it
    if not moment.format.signed:
        ignored = _as_blocks(moment, torch.ones_like(values)) == 0
    smallest = torch.where(ignored, math.inf, blocks).amin(1)
    powers = coding.expansion_power(blocks.amax(1), smallest)
    _set_blocks(moment, "power", start, powers)
    noise = None
    if key is not None:
        noise = _as_blocks(moment, uniforms(key, start, start + numel, device=values.device))
    codes = coding.expanded_codes(_as_blocks(moment, ratios), powers, noise, signed=moment.format.signed)
    _set_codes(moment, start, codes.view(-1)[:numel])


def _ratios(moment: Moment, start: int, stop: int) -> Tensor:
    codes, book = _codes(moment, start, stop), moment.format.book
    if book is not None:
        return coding.book_values(codes, book)
    if moment.format.coding == "softsign":
        return coding.softsign_values(codes)
    powers = _blocks(moment, "power", start, stop)
    return coding.expanded_values(_as_blocks(moment, codes), powers).view(-1)[: stop - start]


def _scales(moment: Moment, start: int, stop: int) -> Tensor:
    scale = _blocks(moment, "scale", start, stop).float()
    return scale + (scale - scale)  # an infinity becomes a NaN


def _block_scales(moment: Moment, start: int, values: Tensor, *, span: float) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude of each block, as it is stored, and span divided by it (0 where it is tiny)."""
    scale = _as_blocks(moment, values).abs().amax(1)
    if moment.format.scale_dtype == torch.bfloat16:
        up = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)  # no ratio exceeds 1
        scale = torch.where(scale.isnan(), scale, up)  # one whose bits are all set would become a zero
    spans = torch.full_like(scale, span)
    return scale, torch.where(scale >= SMALLEST_SCALE, spans / scale, 0.0)


def _as_blocks(moment: Moment, values: Tensor) -> Tensor:
    size = moment.format.block_elements
    rest = -values.numel() % size
    return (pad(values, (0, rest)) if rest else values).view(-1, size)


def _spread(blocks: Tensor, moment: Moment, numel: int) -> Tensor:
    return blocks[:, None].expand(-1, moment.format.block_elements).reshape(-1)[:numel]


def _blocks(moment: Moment, suffix: str, start: int, stop: int) -> Tensor:
    size = moment.format.block_elements
    return moment.tensors[suffix][start // size : -(-stop // size)]


def _set_blocks(moment: Moment, suffix: str, start: int, blocks: Tensor) -> None:
    moment.tensors[suffix][start // moment.format.block_elements :][: blocks.numel()] = blocks


def _codes(moment: Moment, start: int, stop: int) -> Tensor:
    codes = moment.tensors["codes"]
    return (
        codes[start:stop]
        if moment.format.bits == 8
        else coding.unpack(codes[start // 2 : (stop + 127) // 128 * 64], stop - start)
    )


def _set_codes(moment: Moment, start: int, codes: Tensor) -> None:
    packed = codes if moment.format.bits == 8 else coding.pack(codes)
    first = start if moment.format.bits == 8 else start // 2
    moment.tensors["codes"][first : first + packed.numel()] = packed
