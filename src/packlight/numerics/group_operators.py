"""Grouped codes and masks as operators of torch: a schema, a CPU and a CUDA kernel, and a fake one.

    torch.ops.packlight.group_encode    torch.ops.packlight.group_decode
    torch.ops.packlight.mask_encode     torch.ops.packlight.mask_decode

The dispatcher's bookkeeping takes longer than the codes of a small tensor, so `encode` and `decode` call a kernel at
once where nobody listens. They save nothing for autograd: they are made to be called by saved-tensor hooks.

Example:
    >>> import torch
    >>> from packlight.numerics.group_operators import decode, encode
    >>> codes, scales = encode(torch.linspace(-1, 1, 1000), "int8")
    >>> codes.nbytes, scales.nbytes, decode((codes, scales), "int8", 1000, torch.float32).dtype
    (1000, 16, torch.float32)
"""

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import _get_current_dispatch_mode

from packlight.numerics import groups_cpu
from packlight.numerics.groups import DTYPES, GROUP_FORMATS, MASK_DTYPES, GroupFormat, num_mask_bytes

#: The name of the format of one bit an element, which has no scales: `encode` returns its bits alone.
MASK = "mask"

_PLAIN = {Tensor, torch.nn.Parameter}


def encode(flat: Tensor, name: str) -> tuple[Tensor, ...]:
    """Return what stands for a tensor.

    Args:
        flat: fp32, bf16 or fp16, (n,): contiguous; for "mask" bool, too.
        name: of GROUP_FORMATS, or "mask".

    Returns:
        Codes, uint8, and scales, bf16 (of fp8_tensor fp32); of "mask" uint8, (ceil(n / 8),): bits.

    Raises:
        ValueError: the format, the dtype or the shape is another one.
    """
    listened = _is_listened_to(flat)
    with torch.no_grad():
        if name == MASK:
            return (mask_encode(flat) if listened else _mask_encode(flat),)
        return tuple(group_encode(flat, name) if listened else _group_encode(flat, name))


def decode(tensors: tuple[Tensor, ...], name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the tensor that others stand for.

    Args:
        tensors: what `encode` returned.
        name: of GROUP_FORMATS, or "mask".
        numel: the number of elements.
        dtype: fp32, bf16 or fp16; of "mask" bool, too.

    Returns:
        dtype, (numel,): a new tensor.

    Raises:
        ValueError: the tensors are not those of `numel` elements in this format.
    """
    if name == MASK:
        (bits,) = tensors
        return decode_mask(bits, numel, dtype)
    run: Any = group_decode if _is_listened_to(*tensors) else _group_decode
    with torch.no_grad():
        found: Tensor = run(*tensors, name, numel, dtype)
    return found


def decode_mask(bits: Tensor, numel: int, dtype: torch.dtype, value: float = 1.0) -> Tensor:
    """Return zeros, and a value where a bit is set.

    Args:
        bits: uint8, (ceil(numel / 8),): what `encode` returned.
        numel: the number of elements.
        dtype: bool, fp32, bf16 or fp16.
        value: what a set bit stands for: 1 / (1 - p) of a dropout.

    Returns:
        dtype, (numel,): a new tensor.

    Raises:
        ValueError: the bits are not those of `numel` elements.
    """
    run: Any = mask_decode if _is_listened_to(bits) else _mask_decode
    with torch.no_grad():
        found: Tensor = run(bits, numel, dtype, value)
    return found


def _group_encode(flat: Tensor, name: str) -> tuple[Tensor, Tensor]:
    _check_flat(flat, DTYPES)
    return _kernels(flat).encode(flat, _format(name))  # type: ignore[no-any-return]


def _group_decode(codes: Tensor, scales: Tensor, name: str, numel: int, dtype: torch.dtype) -> Tensor:
    fmt = _format(name)
    _check_dtype(dtype, DTYPES)
    _check(codes, torch.uint8, fmt.num_code_bytes(numel), f"{name} codes of {numel} elements")
    _check(scales, fmt.scale_dtype, fmt.num_scales(numel), f"{name} scales of {numel} elements")
    if codes.device != scales.device:
        raise ValueError(f"codes on {codes.device} and scales on {scales.device}; both must be on one device")
    return _kernels(codes).decode(codes, scales, fmt, numel, dtype)  # type: ignore[no-any-return]


def _mask_encode(flat: Tensor) -> Tensor:
    _check_flat(flat, MASK_DTYPES)
    return _kernels(flat).encode_mask(flat)  # type: ignore[no-any-return]


def _mask_decode(bits: Tensor, numel: int, dtype: torch.dtype, value: float) -> Tensor:
    _check_dtype(dtype, MASK_DTYPES)
    _check(bits, torch.uint8, num_mask_bytes(numel), f"a mask of {numel} elements")
    return _kernels(bits).decode_mask(bits, numel, dtype, value)  # type: ignore[no-any-return]


def _operator(name: str, kernel: Any, schema: str) -> CustomOpDef:
    """Register an operator for both devices; the kernel finds its own."""
    made: CustomOpDef = torch.library.custom_op(
        f"packlight::{name}", kernel, mutates_args=(), device_types=("cpu", "cuda"), schema=schema
    )
    return made


group_encode = _operator("group_encode", _group_encode, "(Tensor flat, str name) -> (Tensor, Tensor)")
group_decode = _operator(
    "group_decode",
    _group_decode,
    "(Tensor codes, Tensor scales, str name, SymInt numel, ScalarType dtype) -> Tensor",
)
mask_encode = _operator("mask_encode", _mask_encode, "(Tensor flat) -> Tensor")
mask_decode = _operator(
    "mask_decode", _mask_decode, "(Tensor bits, SymInt numel, ScalarType dtype, float value) -> Tensor"
)


@group_encode.register_fake
def _(flat: Tensor, name: str) -> tuple[Tensor, Tensor]:
    fmt, numel = _format(name), flat.numel()
    codes = flat.new_empty(fmt.num_code_bytes(numel), dtype=torch.uint8)
    return codes, flat.new_empty(fmt.num_scales(numel), dtype=fmt.scale_dtype)


@group_decode.register_fake
def _(codes: Tensor, scales: Tensor, name: str, numel: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(numel, dtype=dtype)


@mask_encode.register_fake
def _(flat: Tensor) -> Tensor:
    return flat.new_empty(num_mask_bytes(flat.numel()), dtype=torch.uint8)


@mask_decode.register_fake
def _(bits: Tensor, numel: int, dtype: torch.dtype, value: float) -> Tensor:
    return bits.new_empty(numel, dtype=dtype)


def _is_listened_to(*tensors: Tensor) -> bool:
    """Return whether a mode, a subclass or a transform is to see the operator; a negative view is one, too."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, tensors))
        or any(map(Tensor.is_neg, tensors))
    )


def _kernels(tensor: Tensor) -> Any:
    """Return the module that has the kernels for a tensor's device."""
    if tensor.is_cpu:
        return groups_cpu
    from packlight.numerics import gpu_groups  # imports Triton, which machines without a GPU lack

    return gpu_groups


def _format(name: str) -> GroupFormat:
    if name not in GROUP_FORMATS:
        raise ValueError(f"no format of saved tensors is called {name!r}; there are {', '.join(GROUP_FORMATS)}")
    return GROUP_FORMATS[name]


def _check_flat(flat: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    _check_dtype(flat.dtype, dtypes)
    _check(flat, flat.dtype, flat.numel(), "a tensor to be encoded")


def _check_dtype(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> None:
    if dtype not in dtypes:
        raise ValueError(f"numbers of {dtype} have no codes; those of {', '.join(map(str, dtypes))} have")


def _check(tensor: Tensor, dtype: torch.dtype, numel: int, what: str) -> None:
    """Raise where a kernel would read beyond a tensor: it gets an address."""
    if tensor.dtype != dtype or tensor.dim() != 1 or len(tensor) != numel or not tensor.is_contiguous():
        raise ValueError(
            f"{what}: got {tensor.dtype}, {tuple(tensor.shape)}, strides {tensor.stride()}; wanted {dtype}, "
            f"({numel},), contiguous"
        )
