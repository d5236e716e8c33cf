"""Grouped codes: tensors that are saved for backward, in 8 or 4 bits an element, or in one.

An activation is written once, read once and thrown away, so its codes need no history and no random rounding. What
matters is that a group of neighbours has a scale of its own: activations have outliers, and one scale for all would
push most of them below the smallest code. Tensors here are flat, and groups are of consecutive elements.

    name         codes              elements a scale   scale   bytes an element
    fp8          E4M3               16                 bf16    1 + 1/8     COAT's input of non-linear layers
    fp8_tensor   E4M3               all                fp32    1           COAT's input of linear layers
    int8         -127 to 127        128                bf16    1 + 1/64
    int4         -7 to 7, two/byte  32                 bf16    1/2 + 1/16
    mask         one bit            none               none    1/8         exact: booleans, signs of ReLU's results

    scale  = max |x| / MAX, rounded up (to bf16, so that no ratio exceeds MAX), at least 2^-112
    code   = nearest code (of two the even one) of x * (1 / scale)
    result = value(code) * scale, not beyond the dtype's largest number, rounded to the dtype

Each operation is in fp32 and rounded once. With the least scale of 2^-112, no result depends on a subnormal number
(an fp32 one has the code 0), so that flushing them changes nothing. A group with a NaN or an infinity has a NaN as its
scale and 0 as its codes: all of it comes back as NaN, so that it shows.

int4 has two codes a byte as in `codes`: the low nibble of a group's byte i is element i, the high one i + 16; a last
group of fewer than 16 elements takes a byte each.

Source: Xi et al., "COAT: Compressing Optimizer states and Activation for Memory-Efficient FP8 Training", ICLR 2025
(arXiv 2410.19313), section 5: mixed-granularity activation quantisation.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Coding = Literal["e4m3", "int8", "int4"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK_DTYPES = (torch.bool, *DTYPES)
SMALLEST_SCALE = 2.0**-112
LARGEST: dict[Coding, float] = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0}


class WorstError(NamedTuple):
    """How far codes may be off: |x - value(code) * scale| <= max(relative * |x|, steps * scale).

    Attributes:
        relative: in units of the element.
        steps: in units of the group's scale.
    """

    relative: float
    steps: float


@dataclass(frozen=True)
class GroupFormat:
    """How a flat tensor is stored as codes with scales.

    Attributes:
        name: what a plan calls it.
        coding: what a code stands for.
        group_elements: consecutive elements that share a scale; 0: all of the tensor.
    """

    name: str
    coding: Coding
    group_elements: int

    @property
    def largest(self) -> float:
        """Return the largest value of a code, in units of the scale."""
        return LARGEST[self.coding]

    @property
    def scale_dtype(self) -> torch.dtype:
        """Return bf16; fp32 where there is only one."""
        return torch.bfloat16 if self.group_elements else torch.float32

    def num_scales(self, numel: int) -> int:
        """Return the number of groups."""
        return -(-numel // self.group_elements) if self.group_elements else 1

    def num_code_bytes(self, numel: int) -> int:
        """Return the bytes of the codes: as many as elements; two codes a byte: half a group's, at a short end more."""
        if self.coding != "int4":
            return numel
        half = self.group_elements // 2
        return numel // self.group_elements * half + min(numel % self.group_elements, half)

    def num_bytes(self, numel: int) -> int:
        """Return the bytes of codes and scales of a tensor of `numel` elements."""
        return self.num_code_bytes(numel) + self.num_scales(numel) * self.scale_dtype.itemsize


GROUP_FORMATS: dict[str, GroupFormat] = {
    each.name: each
    for each in (
        GroupFormat("fp8", "e4m3", 16),
        GroupFormat("fp8_tensor", "e4m3", 0),
        GroupFormat("int8", "int8", 128),
        GroupFormat("int4", "int4", 32),
    )
}


def num_mask_bytes(numel: int) -> int:
    """Return the bytes of a mask: eight elements a byte."""
    return -(-numel // 8)


def worst_error(fmt: GroupFormat) -> WorstError:
    """Return how far the codes of a format may be off.

    E4M3 has 3 bits behind its leading one: half of its last is at most 2^-4 of the value, and below 2^-6, where its
    steps are 2^-9, it is 2^-10. An integer is off by a half. The scale is at most (1 + 2^-7) max |x| / MAX, or 2^-112.

    Two roundings of the ratio add at most 2^-22 |x|, and the result has the rounding of its own dtype.

    Args:
        fmt: the format.

    Returns:
        The bound, relative and in units of the scale.
    """
    return WorstError(2.0**-4, 2.0**-10) if fmt.coding == "e4m3" else WorstError(0.0, 0.5)


def encode(flat: Tensor, fmt: GroupFormat) -> tuple[Tensor, Tensor]:
    """Return a tensor's codes and scales.

    Args:
        flat: fp32, bf16 or fp16, (n,): any numbers.
        fmt: the format.

    Returns:
        Codes, uint8, (fmt.num_code_bytes(n),): the bits of float8_e4m3fn numbers or of int8 ones, or two nibbles.
        Scales, fmt.scale_dtype, (fmt.num_scales(n),).
    """
    groups = _in_groups(flat.float(), fmt)
    largest = groups.abs().amax(1)
    scale = _rounded_up(largest / torch.full_like(largest, fmt.largest), fmt.scale_dtype).clamp_(min=SMALLEST_SCALE)
    finite = largest.isfinite()
    # No clamp: a ratio exceeds MAX by its own rounding at most, and the nearest code takes that away.
    ratios = torch.where(finite[:, None], groups * scale.reciprocal()[:, None], 0.0)
    codes = _codes(ratios, fmt.coding)[: fmt.num_code_bytes(flat.numel())]
    return codes, torch.where(finite, scale, torch.nan).to(fmt.scale_dtype)


def decode(codes: Tensor, scales: Tensor, fmt: GroupFormat, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers that codes stand for.

    Args:
        codes: uint8, (fmt.num_code_bytes(numel),).
        scales: fmt.scale_dtype, (fmt.num_scales(numel),).
        fmt: the format.
        numel: the number of elements.
        dtype: fp32, bf16 or fp16.

    Returns:
        dtype, (numel,): a new tensor.
    """
    values = _in_groups(_values(codes, fmt, numel), fmt) * scales.float()[:, None]
    most = torch.finfo(dtype).max
    return values.view(-1)[:numel].clamp(-most, most).to(dtype)


def encode_mask(flat: Tensor) -> Tensor:
    """Return one bit an element: whether it is true, or not at most zero (so a NaN counts, as in ReLU's backward).

    Args:
        flat: bool, fp32, bf16 or fp16, (n,).

    Returns:
        uint8, (ceil(n / 8),): bit i % 8 of byte i / 8 is element i.
    """
    bits = flat if flat.dtype == torch.bool else ~(flat <= 0)
    rows = pad(bits.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (rows << _bit_numbers(flat.device)).sum(1, dtype=torch.uint8)


def decode_mask(bits: Tensor, numel: int, dtype: torch.dtype, value: float = 1.0) -> Tensor:
    """Return zeros, and a value where a bit is set.

    Args:
        bits: uint8, (ceil(numel / 8),).
        numel: the number of elements.
        dtype: bool, fp32, bf16 or fp16.
        value: what a set bit stands for, rounded to fp32 and then to the dtype: 1 / (1 - p) of a dropout; a bool is
            true whatever it is.

    Returns:
        dtype, (numel,): a new tensor.
    """
    mask = ((bits[:, None] >> _bit_numbers(bits.device)) & 1).view(-1)[:numel].bool()
    if dtype == torch.bool:
        return mask
    values = torch.tensor([0.0, value], dtype=torch.float32, device=bits.device).to(dtype)
    return values[mask.int()]


def _in_groups(flat: Tensor, fmt: GroupFormat) -> Tensor:
    """Return a row a group, with zeros at its end; a tensor without elements has a row where it has a scale."""
    width = fmt.group_elements or max(flat.numel(), 1)
    return pad(flat, (0, fmt.num_scales(flat.numel()) * width - flat.numel())).view(-1, width)


def _rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 numbers that a dtype has; of NaNs anything."""
    if dtype == torch.float32:
        return scale
    return ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _codes(ratios: Tensor, coding: Coding) -> Tensor:
    if coding == "e4m3":
        return ratios.to(torch.float8_e4m3fn).view(torch.uint8).view(-1)
    codes = torch.round(ratios).to(torch.int8).view(torch.uint8)
    if coding == "int8":
        return codes.view(-1)
    low, high = (codes & 15).chunk(2, 1)
    return (low | (high << 4)).view(-1)


def _values(codes: Tensor, fmt: GroupFormat, numel: int) -> Tensor:
    """Return what codes stand for in units of their scales: fp32, (numel,)."""
    if fmt.coding == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    if fmt.coding == "int8":
        return codes.view(torch.int8).float()
    half = fmt.group_elements // 2
    rows = pad(codes, (0, -codes.numel() % half)).view(-1, half)
    nibbles = torch.cat((rows & 15, rows >> 4), 1).view(-1)[:numel]
    return (nibbles ^ 8).float() - 8.0


def _bit_numbers(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
