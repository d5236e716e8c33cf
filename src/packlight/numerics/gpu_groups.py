"""Grouped codes on a GPU, in Triton: what `groups` defines, bit for bit.

A program does a tile of whole groups, in one launch for the tensor. Where all of it has one scale, another launch finds
the largest magnitude of each tile first, and the programs read that of all from device memory: nothing waits for the
device.

With TRITON_INTERPRET=1 in the environment everything here runs on CPU tensors, slowly.

Source: Xi et al., "COAT", ICLR 2025 (arXiv 2410.19313), section 5.
"""
# mypy: disable-error-code="untyped-decorator"

import contextlib
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight.numerics.gpu_codes import bits_of, float_of, load, nearest, number_of
from packlight.numerics.groups import QUARTER, GroupFormat, num_mask_bytes

# Sixteen elements a thread. The interpreter takes as long for a tile of any size.
TILE_ELEMENTS = 65536 if triton.knobs.runtime.interpret else 2048
# No fused multiply-adds and no flushed denormals: results are the reference's.
LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False, "enable_reflect_ftz": False}
# What bits are kept as: Triton's own conversions to bf16 and from bool are not relied on.
BITS = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}

_MAGNITUDE, _INFINITY, _NAN = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000), tl.constexpr(0x7FC00000)
_QUARTER_BITS = tl.constexpr(struct.unpack("<i", struct.pack("<f", QUARTER))[0])
# Where E4M3's exponents start in those of fp32; its least normal number, 2^-6; 2^14, whose last bit is 2^-9.
_E4M3_BIAS, _E4M3_NORMAL, _E4M3_ROUNDER = tl.constexpr(120 << 23), tl.constexpr(121 << 23), tl.constexpr(2.0**14)
_E4M3_ROUNDER_BITS, _E4M3_STEP = tl.constexpr(141 << 23), tl.constexpr(2.0**-9)


def encode(flat: Tensor, fmt: GroupFormat) -> tuple[Tensor, Tensor]:
    """Return a tensor's codes and scales.

    Args:
        flat: fp32, bf16 or fp16, (n,): contiguous.
        fmt: the format.

    Returns:
        Codes, uint8, (fmt.num_code_bytes(n),), and scales, fmt.scale_dtype, (fmt.num_scales(n),).
    """
    numel = flat.numel()
    codes = torch.empty(fmt.num_code_bytes(numel), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(fmt.num_scales(numel), dtype=fmt.scale_dtype, device=flat.device)
    if not numel:
        return codes, scales.fill_(fmt.smallest_scale(flat.dtype))
    most = None if fmt.group_elements else _largest(flat)
    arguments = _bits(flat), codes, _bits(scales), most, numel
    with _current_device(flat.device):
        _encode_kernel[_grid(numel, fmt)](*arguments, **_shape(fmt), **_scales_range(fmt, flat.dtype), **LAUNCH_OPTIONS)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, fmt: GroupFormat, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers that codes stand for.

    Args:
        codes: uint8, (fmt.num_code_bytes(numel),): contiguous.
        scales: fmt.scale_dtype, (fmt.num_scales(numel),): contiguous.
        fmt: the format.
        numel: the number of elements.
        dtype: fp32, bf16 or fp16.

    Returns:
        dtype, (numel,): a new tensor.
    """
    flat = torch.empty(numel, dtype=dtype, device=codes.device)
    if numel:
        arguments = codes, _bits(scales), _bits(flat), numel
        with _current_device(codes.device):
            _decode_kernel[_grid(numel, fmt)](*arguments, **_shape(fmt), MOST=torch.finfo(dtype).max, **LAUNCH_OPTIONS)
    return flat


def encode_mask(flat: Tensor) -> Tensor:
    """Return one bit an element: whether it is true, or not at most zero.

    Args:
        flat: bool, fp32, bf16 or fp16, (n,): contiguous.

    Returns:
        uint8, (ceil(n / 8),).
    """
    bits = torch.empty(num_mask_bytes(flat.numel()), dtype=torch.uint8, device=flat.device)
    if flat.numel():
        with _current_device(flat.device):
            _encode_mask_kernel[(triton.cdiv(flat.numel(), TILE_ELEMENTS),)](
                _bits(flat), bits, flat.numel(), TILE_ELEMENTS, **LAUNCH_OPTIONS
            )
    return bits


def decode_mask(bits: Tensor, numel: int, dtype: torch.dtype, value: float = 1.0) -> Tensor:
    """Return zeros, and a value where a bit is set.

    Args:
        bits: uint8, (ceil(numel / 8),): contiguous.
        numel: the number of elements.
        dtype: bool, fp32, bf16 or fp16.
        value: what a set bit stands for, rounded to fp32 and then to the dtype.

    Returns:
        dtype, (numel,): a new tensor.
    """
    flat = torch.empty(numel, dtype=dtype, device=bits.device)
    if numel:
        one = 1.0 if dtype == torch.bool else value
        with _current_device(bits.device):
            _decode_mask_kernel[(triton.cdiv(numel, TILE_ELEMENTS),)](
                bits, _bits(flat), one, numel, TILE_ELEMENTS, **LAUNCH_OPTIONS
            )
    return flat


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.dtype]) if tensor.dtype in BITS else tensor


def _largest(flat: Tensor) -> Tensor:
    """Return the largest finite magnitude's bits, and whether an element is not finite: int32, (2,)."""
    tiles = triton.cdiv(flat.numel(), TILE_ELEMENTS)
    found = torch.empty(2, tiles, dtype=torch.int32, device=flat.device)
    with _current_device(flat.device):
        _largest_kernel[(tiles,)](_bits(flat), found, flat.numel(), TILE_ELEMENTS, **LAUNCH_OPTIONS)
    return found.amax(1)


def _shape(fmt: GroupFormat) -> dict[str, Any]:
    """Return a tile's shape: groups and elements; a nibble's place is half a group away from the other's."""
    width = fmt.group_elements or TILE_ELEMENTS
    return {"GROUPS": TILE_ELEMENTS // width, "WIDTH": width, "CODING": fmt.coding}


def _scales_range(fmt: GroupFormat, dtype: torch.dtype) -> dict[str, float]:
    """Return what decides about scales: the largest codes, and the least scale."""
    return {"TOP": fmt.largest, "MARKED_TOP": fmt.largest_of_marked, "LEAST": fmt.smallest_scale(dtype)}


def _grid(numel: int, fmt: GroupFormat) -> tuple[int]:
    shape = _shape(fmt)
    return (triton.cdiv(numel, shape["GROUPS"] * shape["WIDTH"]),)


def _current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _largest_kernel(flat: tl.tensor, found: tl.tensor, numel: tl.tensor, ELEMENTS: tl.constexpr) -> None:
    """Write a tile's largest finite magnitude, and behind all tiles', whether it has an element that is not finite."""
    program = tl.program_id(0)
    offset = program.to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)[None, :]
    x = load(flat, offset, offset < numel)
    place = found + program + tl.zeros((1,), tl.int32)
    tl.store(place, _largest_bits(x))
    tl.store(place + tl.num_programs(0), _is_marked(x).to(tl.int32))


@triton.jit
def _encode_kernel(
    flat: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    most: tl.tensor,
    numel: tl.tensor,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CODING: tl.constexpr,
    TOP: tl.constexpr,
    MARKED_TOP: tl.constexpr,
    LEAST: tl.constexpr,
) -> None:
    """Encode a tile: with `most`, what `_largest` found in the tensor, for all tiles alike."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    if CODING == "int4":
        HALF: tl.constexpr = WIDTH // 2
        place = tl.arange(0, HALF)[None, :]
        offset = group[:, None] * WIDTH + place
        low, high = load(flat, offset, offset < numel), load(flat, offset + HALF, offset + HALF < numel)
        largest, is_marked = tl.maximum(_largest_bits(low), _largest_bits(high)), _is_marked(low) | _is_marked(high)
        scale = _scale(largest, tl.where(is_marked, MARKED_TOP, TOP), scales, LEAST)
        code = (_codes(low, scale, is_marked, CODING) & 15) | (_codes(high, scale, is_marked, CODING) << 4)
        tl.store(codes + group[:, None] * HALF + place, code.to(tl.uint8), offset < numel)
    else:
        offset = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        x = load(flat, offset, offset < numel)
        if most is None:
            largest, is_marked = _largest_bits(x), _is_marked(x)
        else:
            place = most + tl.zeros((GROUPS,), tl.int32)
            largest, is_marked = tl.load(place), tl.load(place + 1) != 0
        scale = _scale(largest, tl.where(is_marked, MARKED_TOP, TOP), scales, LEAST)
        tl.store(codes + offset, _codes(x, scale, is_marked, CODING).to(tl.uint8), offset < numel)
    bits = bits_of(scale) | (is_marked.to(tl.int32) << 31)
    if scales.dtype.element_ty == tl.int16:
        tl.store(scales + group, (bits >> 16).to(tl.int16), group * WIDTH < numel)
    else:
        tl.store(scales + group, float_of(bits), group == 0)


@triton.jit
def _decode_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    flat: tl.tensor,
    numel: tl.tensor,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CODING: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    """Decode a tile."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    if scales.dtype.element_ty == tl.int16:
        scale = load(scales, group, group * WIDTH < numel)[:, None]
    else:
        scale = tl.load(scales + tl.zeros((GROUPS,), tl.int32))[:, None]
    if CODING == "int4":
        HALF: tl.constexpr = WIDTH // 2
        place = tl.arange(0, HALF)[None, :]
        offset = group[:, None] * WIDTH + place
        code = tl.load(codes + group[:, None] * HALF + place, offset < numel, other=0).to(tl.int32)
        _store(flat, offset, offset < numel, _decoded((code << 28) >> 28, scale, CODING, MOST))
        high = offset + HALF
        _store(flat, high, high < numel, _decoded((code << 24) >> 28, scale, CODING, MOST))
    else:
        offset = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        code = tl.load(codes + offset, offset < numel, other=0).to(tl.int32)
        if CODING == "int8":
            code = (code << 24) >> 24
        _store(flat, offset, offset < numel, _decoded(code, scale, CODING, MOST))


@triton.jit
def _largest_bits(x: tl.tensor) -> tl.tensor:
    """Return the bits of each group's largest finite magnitude, int32."""
    bits = bits_of(x) & _MAGNITUDE
    return tl.max(tl.where(bits < _INFINITY, bits, 0), 1)


@triton.jit
def _is_marked(x: tl.tensor) -> tl.tensor:
    """Return whether each group has an element that is not finite."""
    return tl.max(bits_of(x) & _MAGNITUDE, 1) >= _INFINITY


@triton.jit
def _scale(largest: tl.tensor, top: tl.tensor, scales: tl.tensor, LEAST: tl.constexpr) -> tl.tensor:
    """Return the scales of magnitudes given as bits, without their signs."""
    quotient = bits_of(tl.div_rn(float_of(largest), top))
    if scales.dtype.element_ty == tl.int16:
        quotient = (quotient + 0xFFFF) & -0x10000
    # As integers: those of numbers not below zero have the same order.
    return float_of(tl.maximum(quotient, bits_of(tl.full(largest.shape, LEAST, tl.float32))))


@triton.jit
def _codes(x: tl.tensor, scale: tl.tensor, is_marked: tl.tensor, CODING: tl.constexpr) -> tl.tensor:
    """Return the nearest codes, int32, of which the lowest bits count."""
    bits = bits_of(x)
    magnitude = bits & _MAGNITUDE
    is_finite = magnitude < _INFINITY
    ratio = float_of(tl.where(is_finite, bits, 0)) * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    if CODING == "e4m3":
        code = tl.maximum(_e4m3_codes(ratio), tl.minimum(magnitude, 1)) | ((bits >> 24) & 0x80)
        code = tl.where((code == 0x80) & is_marked[:, None], 0, code)
        infinity, nan = 0x7F | ((bits >> 24) & 0x80), 0x80
    else:
        BEYOND: tl.constexpr = 127 if CODING == "int8" else 7
        code = nearest(ratio)
        code = tl.where((code == 0) & (magnitude != 0), tl.where(bits < 0, -BEYOND, BEYOND), code)
        infinity, nan = tl.where(bits < 0, 1 - BEYOND, BEYOND - 1), -1 - BEYOND
    return tl.where(is_finite, code, tl.where(magnitude > _INFINITY, nan, infinity))


@triton.jit
def _e4m3_codes(ratio: tl.tensor) -> tl.tensor:
    """Return the bits of the nearest E4M3 numbers' magnitudes."""
    magnitude = bits_of(ratio) & _MAGNITUDE
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (_E4M3_BIAS >> 20)
    subnormal = bits_of(float_of(magnitude) + _E4M3_ROUNDER) - _E4M3_ROUNDER_BITS
    return tl.where(magnitude < _E4M3_NORMAL, subnormal, normal)


@triton.jit
def _decoded(code: tl.tensor, scale: tl.tensor, CODING: tl.constexpr, MOST: tl.constexpr) -> tl.tensor:
    """Return the numbers that codes stand for, those beyond the dtype's largest as that."""
    if CODING == "e4m3":
        value, sign = _e4m3_values(code), (code & 0x80) << 24
        is_infinite, is_nan = (code & 0x7F) == 0x7F, code == 0x80
    else:
        BEYOND: tl.constexpr = 127 if CODING == "int8" else 7
        value, sign = number_of(code), code & ~_MAGNITUDE
        value = tl.where(tl.abs(code) == BEYOND, float_of(sign | _QUARTER_BITS), value)
        is_infinite, is_nan = tl.abs(code) == BEYOND - 1, code == -1 - BEYOND
    value *= tl.abs(scale)
    value = tl.where(value > MOST, MOST, tl.where(value < -MOST, -MOST, value))
    value = tl.where((scale < 0) & is_infinite, float_of(sign | _INFINITY), value)
    return tl.where((scale < 0) & is_nan, float_of(tl.full(code.shape, _NAN, tl.int32)), value)


@triton.jit
def _e4m3_values(code: tl.tensor) -> tl.tensor:
    """Return what the bits of E4M3 numbers stand for."""
    magnitude = code & 127
    value = tl.where(magnitude < 8, number_of(magnitude) * _E4M3_STEP, float_of((magnitude << 20) + _E4M3_BIAS))
    return float_of(bits_of(value) | ((code & 0x80) << 24))  # Triton's minus makes zeros positive


@triton.jit
def _store(pointer: tl.tensor, offset: tl.tensor, mask: tl.tensor, value: tl.tensor) -> None:
    """Store fp32 numbers; a pointer to int16 is one to bf16."""
    if pointer.dtype.element_ty == tl.int16:
        bits = bits_of(value)
        rounded = bits + ((bits >> 16) & 1) + 0x7FFF
        # A GPU's own NaN has all bits set: rounding would make it a zero.
        tl.store(pointer + offset, (tl.where(value == value, rounded, _NAN) >> 16).to(tl.int16), mask)
    else:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask)


@triton.jit
def _encode_mask_kernel(flat: tl.tensor, bits: tl.tensor, numel: tl.tensor, ELEMENTS: tl.constexpr) -> None:
    """Gather a tile's bits, eight in a byte."""
    byte = tl.program_id(0).to(tl.int64) * (ELEMENTS // 8) + tl.arange(0, ELEMENTS // 8)
    bit = tl.arange(0, 8)[None, :]
    offset = byte[:, None] * 8 + bit
    x = load(flat, offset, offset < numel)
    is_set = (x > 0) | (x != x)
    tl.store(bits + byte, tl.sum(is_set.to(tl.int32) << bit, 1).to(tl.uint8), byte * 8 < numel)


@triton.jit
def _decode_mask_kernel(
    bits: tl.tensor, flat: tl.tensor, value: tl.tensor, numel: tl.tensor, ELEMENTS: tl.constexpr
) -> None:
    """Write a tile's values."""
    offset = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    byte = tl.load(bits + offset // 8, offset < numel, other=0).to(tl.int32)
    is_set = ((byte >> (offset % 8).to(tl.int32)) & 1) != 0
    _store(flat, offset, offset < numel, tl.where(is_set, value, 0.0))
