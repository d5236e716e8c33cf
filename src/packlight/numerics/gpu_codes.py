"""Codes, random bits and rounding as Triton functions: what `codes`, `noise` and `rounding` define.

A kernel works on a tile in two halves: the elements i and i + 64 of blocks of 128, which share a byte of 4-bit
codes and a word of random bits. So a thread has both, and packing needs no exchange. With blocks of 32, a half
is 32 elements wide, and each line of each half has a scale of its own:

    WIDTH 64:  | low, one scale                | high, the same scale          |
    WIDTH 32:  | low, line 0   | low, line 1   | high, line 0  | high, line 1  |  a scale each

A half is (width, lines), the first axis along memory: Triton's order for loads without one, such as from tables,
so that all loads have one layout. What functions share goes in tuples:

    halves  low and high half
    place   offset of the tile, int64; of its lines in it, (lines,), int32; 0 to WIDTH - 1; which lines there are
            of the low and of the high half, (lines,); which elements there are of the low and of the high half:
            start, base, index, low_lines, high_lines, low_mask, high_mask
    tables  values, borders, limits: pointers to what `books` has

Each floating-point operation is one of the reference's, in its order, rounded once: no quotients or roots but
those rounded to nearest. bf16 is moved as 16-bit integers, so that its rounding is written here and nowhere
else. Conversions between integers and floats are additions of a power of two: the GPU's own take eight times as
long.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 2; Xi et al., "COAT", ICLR 2025 (arXiv 2410.19313), section 4.1.
"""

import triton
import triton.language as tl

from packlight.numerics import noise

_MULTIPLIER_1, _MULTIPLIER_2 = tl.constexpr(noise.MULTIPLIER_1), tl.constexpr(noise.MULTIPLIER_2)
_WEYL = tl.constexpr(noise.WEYL)
_FIRST_UNIFORM, _SECOND_UNIFORM = tl.constexpr(noise.FIRST_UNIFORM), tl.constexpr(noise.SECOND_UNIFORM)
_MAGNITUDE, _INFINITY = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)
# Added to a number below 2^22, it leaves the nearest integer (of two the even one) in the lowest bits.
_ROUNDER, _ROUNDER_BITS = tl.constexpr(1.5 * 2**23), tl.constexpr(0x4B400000)


@triton.jit
def float_of(bits: tl.tensor) -> tl.tensor:
    """Return the fp32 numbers of int32 bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bits_of(value: tl.tensor) -> tl.tensor:
    """Return the int32 bits of fp32 numbers."""
    return value.to(tl.int32, bitcast=True)


@triton.jit
def magnitude_bits(value: tl.tensor, mask: tl.tensor, WHOLE: tl.constexpr) -> tl.tensor:
    """Return the bits of fp32 magnitudes, int32; 0 where the mask is off (in whole lines that are not there, too)."""
    bits = bits_of(value) & _MAGNITUDE
    return bits if WHOLE else tl.where(mask, bits, 0)


@triton.jit
def number_of(integer: tl.tensor) -> tl.tensor:
    """Return int32 numbers below 2^22 as fp32."""
    return float_of(integer + _ROUNDER_BITS) - _ROUNDER


@triton.jit
def nearest(value: tl.tensor) -> tl.tensor:
    """Return the nearest integers of fp32 numbers below 2^22, int32; anything for others."""
    return bits_of(value + _ROUNDER) - _ROUNDER_BITS


@triton.jit
def load(pointer: tl.tensor, offset: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Return fp32 numbers; a pointer to int16 is one to bf16."""
    value = tl.load(pointer + offset, mask, other=0)
    if pointer.dtype.element_ty == tl.int16:
        value = float_of(value.to(tl.int32) << 16)
    return value.to(tl.float32)


@triton.jit
def offsets_of(place: tl.tuple) -> tl.tensor:
    """Return the offsets of the low half in a tile."""
    return place[1][None, :] + place[2][:, None]


# `noise`


@triton.jit
def key_at(seed: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Return the key of a parameter's step, uint32."""
    return _mixed(_mixed(seed.to(tl.uint32)) + step.to(tl.int32).to(tl.uint32) * _WEYL)


@triton.jit
def _mixed(number: tl.tensor) -> tl.tensor:
    number = (number ^ (number >> 16)) * _MULTIPLIER_1
    number = (number ^ (number >> 15)) * _MULTIPLIER_2
    return number ^ (number >> 16)


@triton.jit
def words(place: tl.tuple, key: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """Return the random words that low and high half share, uint32; `shift` is what a piece's place adds."""
    start = place[0] + place[1].to(tl.int64)
    line = start.to(tl.uint32) * _MULTIPLIER_1 + (start >> 32).to(tl.uint32) * _WEYL + key + shift
    weyl = line[None, :] + (place[2].to(tl.uint32) * _MULTIPLIER_1)[:, None]
    return (weyl ^ (weyl >> 15)) * _MULTIPLIER_2


@triton.jit
def uniforms(word: tl.tensor, STOCHASTIC: tl.constexpr) -> tl.tuple:
    """Return the numbers between 0 and 1 of both halves, or zeros."""
    if STOCHASTIC:
        low = ((word >> 9) | _FIRST_UNIFORM).to(tl.float32, bitcast=True) - 1
        high = (((word & 0xFFFF) << 7) | _SECOND_UNIFORM).to(tl.float32, bitcast=True) - 1
    else:
        low, high = 0.0, 0.0
    return low, high


# `rounding`


@triton.jit
def read_parameter(
    param: tl.tensor, error: tl.tensor, offset: tl.tensor, mask: tl.tensor, ROUNDING: tl.constexpr
) -> tl.tensor:
    """Return a half of a parameter, error bits included."""
    value = load(param, offset, mask)
    if ROUNDING == "master24" or ROUNDING == "master32":
        rest = tl.load(error + offset, mask, other=0).to(tl.int32)
        if ROUNDING == "master24":
            rest = rest * 256
        value = float_of(bits_of(value) + rest)
    return value


@triton.jit
def write_parameter(
    param: tl.tensor,
    error: tl.tensor,
    offset: tl.tensor,
    mask: tl.tensor,
    value: tl.tensor,
    random: tl.tensor,
    ROUNDING: tl.constexpr,
) -> None:
    """Store a half of a parameter; `random` are 16 bits an element, for stochastic rounding.

    Infinities and NaNs are cut off: arithmetic sets the highest bit of a NaN's 23, so it remains one.
    """
    if param.dtype.element_ty == tl.int16:
        bits = bits_of(value)
        finite = (bits & _INFINITY) != _INFINITY
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
        tl.store(param + offset, (tl.where(finite, whole, bits) >> 16).to(tl.int16), mask)
    else:
        tl.store(param + offset, value.to(param.dtype.element_ty), mask)


# `codes`


@triton.jit
def book_codes(ratio: tl.tensor, cells: tl.tensor) -> tl.tensor:
    """Return the nearest codes of ratios times the span: borders have codes in their lowest bits (`books`)."""
    border = tl.load(cells + ((nearest(ratio) + 15) & 31))
    code = (border & 15) + (ratio > float_of(border)).to(tl.int32)
    return tl.where(ratio == ratio, code, 0)


@triton.jit
def root_codes(level: tl.tensor, uniform: tl.tensor, STOCHASTIC: tl.constexpr) -> tl.tensor:
    """Return the codes of square roots in units of a level."""
    if STOCHASTIC:
        level = level + (uniform - 0.5)
    return nearest(tl.where(level > 1, level, 1.0) - 1)


@triton.jit
def softsign_codes(ratio: tl.tensor) -> tl.tensor:
    """Return the nearest codes, from -127 to 127."""
    code = nearest(tl.div_rn(ratio * 254.0, tl.abs(ratio) + 1))
    return tl.where(ratio == ratio, code, 0)


@triton.jit
def softsign_values(code: tl.tensor) -> tl.tensor:
    """Return what codes stand for."""
    level = number_of(code)
    return tl.div_rn(level, 254.0 - tl.abs(level))


@triton.jit
def _expanded_guess(magnitude: tl.tensor, power: tl.tensor) -> tl.tensor:
    """Return the E4M3 code of magnitude^k, k = power / 16, by approximate functions: off by one at most."""
    expanded = tl.exp2(tl.log2(magnitude) * (power.to(tl.float32) * 0.0625)) * 448.0
    normal = ((bits_of(expanded) + 0x80000) >> 20) - 960
    code = tl.where(expanded < 0.015625, nearest(expanded * 512.0), normal)
    return tl.minimum(tl.maximum(code, 0), 126)


@triton.jit
def expanded_codes(
    ratio: tl.tensor,
    power: tl.tensor,
    uniform: tl.tensor,
    tables: tl.tuple,
    SIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> tl.tensor:
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
def expanded_values(code: tl.tensor, power: tl.tensor, values: tl.tensor) -> tl.tensor:
    """Return what E4M3 codes stand for after expansion."""
    value = tl.load(values + power * 128 + (code & 127))
    return tl.where(code > 127, -value, value)
