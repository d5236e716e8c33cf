"""Grouped codes on the CPU: compiled, or the reference where there is no compiler.

PyTorch's conversion to float8_e4m3fn takes several passes with its scale, each through memory, and there is no
4-bit dtype. Here a tensor is read once (with one scale for all of it: twice) and its codes are written once.
"""

import ctypes
import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from packlight.numerics import groups
from packlight.numerics.compiler import CompilerFailed, CompilerMissing, load
from packlight.numerics.groups import GROUP_FORMATS, GroupFormat, num_mask_bytes

SOURCE = Path(__file__).with_name("groups.cpp")
# As groups.cpp numbers them.
KINDS = {GROUP_FORMATS[name]: kind for kind, name in enumerate(("fp8", "fp8_tensor", "int8", "int4"))}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}
# The fastest way to hand out a few thousand elements is not to.
SERIAL_ELEMENTS = 2**15


def encode(flat: Tensor, fmt: GroupFormat) -> tuple[Tensor, Tensor]:
    """Return a tensor's codes and scales.

    Args:
        flat: fp32, bf16 or fp16, (n,): contiguous.
        fmt: the format.

    Returns:
        Codes, uint8, (fmt.num_code_bytes(n),), and scales, fmt.scale_dtype, (fmt.num_scales(n),).
    """
    library, numel = compiled(), flat.numel()
    if library is None or fmt not in KINDS:
        return groups.encode(flat, fmt)
    codes = torch.empty(fmt.num_code_bytes(numel), dtype=torch.uint8)
    scales = torch.empty(fmt.num_scales(numel), dtype=fmt.scale_dtype)
    how = numel, TYPES[flat.dtype], KINDS[fmt]
    library.packlight_group_encode(flat.data_ptr(), *how, codes.data_ptr(), scales.data_ptr(), _threads(numel))
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
    library = compiled()
    if library is None or fmt not in KINDS:
        return groups.decode(codes, scales, fmt, numel, dtype)
    flat = torch.empty(numel, dtype=dtype)
    how = numel, TYPES[dtype], KINDS[fmt]
    library.packlight_group_decode(codes.data_ptr(), scales.data_ptr(), *how, flat.data_ptr(), _threads(numel))
    return flat


def encode_mask(flat: Tensor) -> Tensor:
    """Return one bit an element: whether it is true, or not at most zero.

    Args:
        flat: bool, fp32, bf16 or fp16, (n,): contiguous.

    Returns:
        uint8, (ceil(n / 8),).
    """
    library, numel = compiled(), flat.numel()
    if library is None:
        return groups.encode_mask(flat)
    bits = torch.empty(num_mask_bytes(numel), dtype=torch.uint8)
    library.packlight_mask_encode(flat.data_ptr(), numel, TYPES[flat.dtype], bits.data_ptr(), _threads(numel))
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
    library = compiled()
    if library is None:
        return groups.decode_mask(bits, numel, dtype, value)
    flat = torch.empty(numel, dtype=dtype)
    library.packlight_mask_decode(bits.data_ptr(), numel, TYPES[dtype], value, flat.data_ptr(), _threads(numel))
    return flat


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Return the compiled library, built at its first use; None where it cannot be built, with one warning."""
    try:
        library = load(SOURCE)
    except (CompilerMissing, CompilerFailed) as error:
        warnings.warn(
            f"packlight's CPU kernels could not be compiled, so activations are compressed in plain PyTorch, many "
            f"times slower. Install a C++ compiler, or set CXX to one. {error}",
            stacklevel=2,
        )
        return None
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.packlight_group_encode.argtypes = [pointer, size, integer, integer, pointer, pointer, integer]
    library.packlight_group_decode.argtypes = [pointer, pointer, size, integer, integer, pointer, integer]
    library.packlight_mask_encode.argtypes = [pointer, size, integer, pointer, integer]
    library.packlight_mask_decode.argtypes = [pointer, size, integer, ctypes.c_float, pointer, integer]
    for function in (library.packlight_group_encode, library.packlight_group_decode):
        function.restype = None
    for function in (library.packlight_mask_encode, library.packlight_mask_decode):
        function.restype = None
    return library


def _threads(numel: int) -> int:
    return 1 if numel <= SERIAL_ELEMENTS else torch.get_num_threads()
