"""Codes, random bits and rounding as Triton functions: what `codes`, `noise` and `rounding` define.

A kernel works on a tile in two halves: the elements i and i + 64 of blocks of 128, which share a byte of 4-bit
codes and a word of random bits. So a thread has both, and packing needs no exchange. With blocks of 32, a half
is 32 elements wide, and each row of each half has a scale of its own:

    WIDTH 64:  | low, one scale                | high, the same scale          |
    WIDTH 32:  | low, row 0    | low, row 1    | high, row 0   | high, row 1   |  a scale each

What functions share goes in tuples: halves (low, high); a place (base, index, numel): the offsets of the low
half's rows, int64, the elements of a row from 0 on, and the tensor's size; and tables (values, borders, limits),
pointers to what `books` has.

Each floating-point operation is one of the reference's, in its order, rounded once: no quotients or roots but
those rounded to nearest. bf16 is moved as 16-bit integers, so that its rounding is written here and nowhere else.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 2; Xi et al., "COAT", ICLR 2025 (arXiv 2410.19313), section 4.1.
"""

from typing import Any

import triton
import triton.language as tl

from packlight.numerics import noise

_MULTIPLIER_1, _MULTIPLIER_2 = tl.constexpr(noise.MULTIPLIER_1), tl.constexpr(noise.MULTIPLIER_2)
_WEYL = tl.constexpr(noise.WEYL)
_MAGNITUDE, _INFINITY, _NAN = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000), tl.constexpr(0x7FC00000)
# Added to a number below 2^22, it leaves the nearest integer (of two the even one) in the lowest bits.
_ROUNDER, _ROUNDER_BITS = tl.constexpr(1.5 * 2**23), tl.constexpr(0x4B400000)


@triton.jit
def float_of(bits: Any) -> Any:
    """Return the fp32 numbers of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(value: Any, mask: Any) -> Any:
    """Return the bits of fp32 magnitudes, int32; 0 where the mask is off."""
    return tl.where(mask, value.to(tl.int32, bitcast=True) & _MAGNITUDE, 0)


@triton.jit
def load(pointer: Any, offset: Any, mask: Any) -> Any:
    """Return fp32 numbers; a pointer to int16 is one to bf16."""
    value = tl.load(pointer + offset, mask, other=0)
    if pointer.dtype.element_ty == tl.int16:
        value = float_of(value.to(tl.int32) << 16)
    return value.to(tl.float32)


@triton.jit
def offsets_of(place: Any) -> Any:
    """Return the offsets of the low half, and which elements of low and high half there are."""
    base, index, numel = place
    offset = base[:, None] + index[None, :]
    return offset, offset < numel, offset + 64 < numel


@triton.jit
def _rounded(value: Any) -> Any:
    return (value + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS


# `noise`


@triton.jit
def key_at(seed: Any, step: Any) -> Any:
    """Return the key of a parameter's step, uint32."""
    return _mixed(_mixed(seed.to(tl.uint32)) + step.to(tl.int32).to(tl.uint32) * _WEYL)


@triton.jit
def _mixed(number: Any) -> Any:
    number = (number ^ (number >> 16)) * _MULTIPLIER_1
    number = (number ^ (number >> 15)) * _MULTIPLIER_2
    return number ^ (number >> 16)


@triton.jit
def words(place: Any, key: Any) -> Any:
    """Return the random words that low and high half share, uint32."""
    base, index, _ = place
    start = base.to(tl.uint32) * _MULTIPLIER_1 + (base >> 32).to(tl.uint32) * _WEYL + key
    weyl = start[:, None] + (index.to(tl.uint32) * _MULTIPLIER_1)[None, :]
    return (weyl ^ (weyl >> 15)) * _MULTIPLIER_2


@triton.jit
def uniforms(word: Any, STOCHASTIC: tl.constexpr) -> Any:
    """Return the numbers in [0, 1) of both halves, or zeros."""
    if STOCHASTIC:
        low = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1
        high = (((word & 0xFFFF) << 7) | 0x3F800000).to(tl.float32, bitcast=True) - 1
    else:
        low, high = 0.0, 0.0
    return low, high


# `rounding`


@triton.jit
def read_parameter(param: Any, error: Any, offset: Any, mask: Any, ROUNDING: tl.constexpr) -> Any:
    """Return a half of a parameter, error bits included."""
    value = load(param, offset, mask)
    if ROUNDING == "master24" or ROUNDING == "master32":
        rest = tl.load(error + offset, mask, other=0).to(tl.int32)
        if ROUNDING == "master24":
            rest = rest * 256
        value = float_of(value.to(tl.int32, bitcast=True) + rest)
    return value


@triton.jit
def write_parameter(
    param: Any, error: Any, offset: Any, mask: Any, value: Any, random: Any, ROUNDING: tl.constexpr
) -> None:
    """Store a half of a parameter; `random` are 16 bits an element, for stochastic rounding."""
    if param.dtype.element_ty == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        finite = (bits & _MAGNITUDE) < _INFINITY
        if ROUNDING == "stochastic":
            whole = bits + random
        elif ROUNDING == "nearest":
            whole = bits + ((bits >> 16) & 1) + 0x7FFF
        else:
            whole = bits + 0x8000
            rest = bits - (whole & -0x10000)
            if ROUNDING == "master24":
                rest = tl.minimum((rest + 128) >> 8, 127)
            tl.store(error + offset, tl.where(finite, rest, 0).to(error.dtype.element_ty), mask)
        whole = tl.where(finite, whole, tl.where((bits & _MAGNITUDE) > _INFINITY, _NAN, bits))
        tl.store(param + offset, (whole >> 16).to(tl.int16), mask)
    else:
        tl.store(param + offset, value.to(param.dtype.element_ty), mask)


# `codes`


@triton.jit
def book_codes(ratio: Any, cells: Any) -> Any:
    """Return the nearest codes of ratios times the span: borders have codes in their lowest bits (`books`)."""
    border = tl.load(cells + ((_rounded(ratio) + 15) & 31))
    code = (border & 15) + (ratio > float_of(border)).to(tl.int32)
    return tl.where(ratio == ratio, code, 0)


@triton.jit
def root_codes(level: Any, uniform: Any, STOCHASTIC: tl.constexpr) -> Any:
    """Return the codes of square roots in units of a level."""
    level = tl.where(level > 1, level, 1.0)
    if STOCHASTIC:
        floor = tl.floor(level)
        above = (level - floor) * (level + floor) > uniform * (floor + floor + 1)
        code = floor.to(tl.int32) - 1 + above.to(tl.int32)
    else:
        code = _rounded(level - 1)
    return code


@triton.jit
def softsign_codes(ratio: Any) -> Any:
    """Return the nearest codes, from -127 to 127."""
    code = _rounded(tl.div_rn(ratio * 254.0, tl.abs(ratio) + 1))
    return tl.where(ratio == ratio, code, 0)


@triton.jit
def softsign_values(code: Any) -> Any:
    """Return what codes stand for."""
    level = code.to(tl.float32)
    return tl.div_rn(level, 254.0 - tl.abs(level))


@triton.jit
def _expanded_guess(magnitude: Any, power: Any) -> Any:
    """Return the E4M3 code of magnitude^k, k = power / 16, by approximate functions: off by one at most."""
    expanded = tl.exp2(tl.log2(magnitude) * (power.to(tl.float32) * 0.0625)) * 448.0
    normal = ((expanded.to(tl.int32, bitcast=True) + 0x80000) >> 20) - 960
    code = tl.where(expanded < 0.015625, _rounded(expanded * 512.0), normal)
    return tl.minimum(tl.maximum(code, 0), 126)


@triton.jit
def expanded_codes(
    ratio: Any, power: Any, uniform: Any, tables: Any, SIGNED: tl.constexpr, STOCHASTIC: tl.constexpr
) -> Any:
    """Return the E4M3 codes: a guess, settled by the borders or values on both sides of it."""
    values, borders = tables[0] + power * 128, tables[1] + power * 128
    magnitude = tl.where(ratio == ratio, tl.abs(ratio), 0.0)
    code = _expanded_guess(magnitude, power)
    if STOCHASTIC:
        reached = (code < 126) & (tl.load(values + tl.minimum(code + 1, 126)) <= magnitude)
        code = code + reached.to(tl.int32) - (tl.load(values + code) > magnitude).to(tl.int32)
        low, high = tl.load(values + code), tl.load(values + tl.minimum(code + 1, 126))
        code = code + (magnitude - low > uniform * (high - low)).to(tl.int32)
    else:
        above = magnitude > tl.load(borders + code)
        below = (code > 0) & (magnitude <= tl.load(borders + tl.maximum(code - 1, 0)))
        code = code + above.to(tl.int32) - below.to(tl.int32)
    code = tl.minimum(tl.maximum(code, 0 if SIGNED else 1), 126)
    if SIGNED:
        code = tl.where(ratio < 0, code | 128, code)
    return code


@triton.jit
def expanded_values(code: Any, power: Any, values: Any) -> Any:
    """Return what E4M3 codes stand for after expansion."""
    value = tl.load(values + power * 128 + (code & 127))
    return tl.where(code > 127, -value, value)
