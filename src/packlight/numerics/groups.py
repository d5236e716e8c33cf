"""Grouped codes: tensors that are saved for backward, in 8 or 4 bits an element, or in one.

An activation is written once, read once and thrown away, so its codes need no history and no random rounding. What
matters is that a group of neighbours has a scale of its own: activations have outliers, and one scale for all would
push most of them below the smallest code. Tensors here are flat, and groups are of consecutive elements.

    name         codes                    elements a scale   scale   bytes an element
    fp8          E4M3                     16                 bf16    1 + 1/8     COAT's input of non-linear layers
    fp8_tensor   E4M3                     all                fp32    1           COAT's input of linear layers
    int8         -126 to 126, +-1/4       128                bf16    1 + 1/64
    int4         -6 to 6, +-1/4, 2/byte   32                 bf16    1/2 + 1/16
    mask         one bit                  none               none    1/8         exact: booleans, ReLU's signs

    scale  = max |x| / MAX over finite x, rounded up (to bf16, so that no ratio exceeds MAX), at least a least scale
    code   = nearest code (of two the even one) of x * (1 / scale); if that is 0 and x is not, the smallest of x's sign
    result = value(code) * scale, not beyond the dtype's largest number, rounded to the dtype

Backward divides by what it saved, so what is not zero does not become zero. The smallest code is 2^-9 of E4M3; of an
integer, the code one beyond MAX stands for a quarter, which is nearer to what it is used for than 0 or 1 are.

A sign of the scale says that some of its elements are not finite: a mask's -inf among scores is no accident. Each comes
back as it was, from a code of its own, and the others lose nothing but one step of an integer's range:

                     largest finite   infinities   NaN    a quarter
    E4M3             448              7F, FF       80     (none; -0 comes back as 0)
    int8             125              126, -126    -128   127, -127
    int4             5                6, -6        -8     7, -7

Each operation is in fp32 and rounded once. With the least scale of 2^-112, no result depends on a subnormal number
(an fp32 one has the smallest code), so that flushing them changes nothing. fp16 numbers have a larger least scale, with
which the smallest code is their smallest number.

int4 has two codes a byte as in `codes`: the low nibble of a group's byte i is element i, the high one i + 16; a last
group of fewer than 16 elements takes a byte each.

Source: Xi et al., "COAT: Compressing Optimizer states and Activation for Memory-Efficient FP8 Training", ICLR 2025
(arXiv 2410.19313), section 5: mixed-granularity activation quantisation.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Coding = Literal["e4m3", "int8", "int4"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK_DTYPES = (torch.bool, *DTYPES)
SMALLEST_SCALE = 2.0**-112
LARGEST: dict[Coding, float] = {"e4m3": 448.0, "int8": 126.0, "int4": 6.0}
#: What an integer's code beyond the largest stands for, in units of the scale.
QUARTER = 0.25
#: Codes in groups whose scale is below zero, and what they stand for.
SPECIAL: dict[Coding, dict[int, float]] = {
    "e4m3": {0x7F: math.inf, 0xFF: -math.inf, 0x80: math.nan},
    "int8": {126: math.inf, -126: -math.inf, -128: math.nan},
    "int4": {6: math.inf, -6: -math.inf, -8: math.nan},
}


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
    def largest_of_marked(self) -> float:
        """Return the largest value of a finite code where another code of the group is infinite or NaN."""
        return self.largest if self.coding == "e4m3" else self.largest - 1

    def smallest_scale(self, dtype: torch.dtype) -> float:
        """Return the least scale for numbers of a dtype: with less, fp16's subnormals could not tell a code from 0."""
        if dtype != torch.float16:
            return SMALLEST_SCALE
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        return smallest * 2.0**9 if self.coding == "e4m3" else smallest / QUARTER

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
    steps are 2^-9, half of one; what would become 0 becomes a step, and is a step off at most. An integer is off by a
    half; what would become 0 is between 0 and a half and becomes a quarter. The scale is at most
    (1 + 2^-7) max |x| / MAX, where MAX is one less in a group that is not all finite, or the least scale.

    Two roundings of the ratio add at most 2^-22 |x|, and the result has the rounding of its own dtype.

    Args:
        fmt: the format.

    Returns:
        The bound, relative and in units of the scale.
    """
    return WorstError(2.0**-4, 2.0**-9) if fmt.coding == "e4m3" else WorstError(0.0, 0.5)


def encode(flat: Tensor, fmt: GroupFormat) -> tuple[Tensor, Tensor]:
    """Return a tensor's codes and scales.

    Args:
        flat: fp32, bf16 or fp16, (n,): any numbers.
        fmt: the format.

    Returns:
        Codes, uint8, (fmt.num_code_bytes(n),): the bits of float8_e4m3fn numbers or of int8 ones, or two nibbles.
        Scales, fmt.scale_dtype, (fmt.num_scales(n),): below zero where an element of the group is not finite.
    """
    groups = _in_groups(flat.float(), fmt)
    magnitude = groups.view(torch.int32) & 0x7FFFFFFF  # as bits, where a subnormal that is flushed is no zero
    is_finite = magnitude < 0x7F800000
    is_marked = ~is_finite.all(1)
    finite = torch.where(is_finite, groups, 0.0)
    largest = finite.abs().amax(1)
    top = torch.full_like(largest, fmt.largest).masked_fill_(is_marked, fmt.largest_of_marked)
    scale = _rounded_up(largest / top, fmt.scale_dtype).clamp_(min=fmt.smallest_scale(flat.dtype))
    # No clamp: a ratio exceeds MAX by its own rounding at most, and the nearest code takes that away.
    codes = _codes(finite * scale.reciprocal()[:, None], fmt.coding)
    smallest = torch.where(groups.signbit(), *_smallest_codes(fmt.coding)).int()
    codes = torch.where(_is_zero(codes, fmt.coding) & (magnitude > 0), smallest, codes)
    if fmt.coding == "e4m3":
        codes.masked_fill_(is_marked[:, None] & (codes == 0x80), 0)
    for code, value in SPECIAL[fmt.coding].items():
        codes.masked_fill_(groups.isnan() if math.isnan(value) else groups == value, code)
    packed = _packed(codes, fmt.coding)[: fmt.num_code_bytes(flat.numel())]
    return packed, torch.where(is_marked, -scale, scale).to(fmt.scale_dtype)


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
    numbers = _in_groups(_unpacked(codes, fmt, numel), fmt)
    most, scale = torch.finfo(dtype).max, scales.float()[:, None]
    decoded = (_values(numbers, fmt.coding) * scale.abs()).clamp(-most, most).to(dtype)
    for code, value in SPECIAL[fmt.coding].items():
        decoded.masked_fill_((scale < 0) & (numbers == code), value)
    return decoded.view(-1)[:numel]


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
    """Return the nearest codes, int32: bits of E4M3 numbers, or integers."""
    if coding == "e4m3":
        return ratios.to(torch.float8_e4m3fn).view(torch.uint8).int()
    return torch.round(ratios).int()


def _is_zero(codes: Tensor, coding: Coding) -> Tensor:
    return codes & 0x7F == 0 if coding == "e4m3" else codes == 0


def _smallest_codes(coding: Coding) -> tuple[int, int]:
    """Return the codes that are nearest to zero: below it, and above it."""
    beyond = int(LARGEST[coding]) + 1
    return (0x81, 0x01) if coding == "e4m3" else (-beyond, beyond)


def _values(numbers: Tensor, coding: Coding) -> Tensor:
    """Return what codes stand for in units of their scales, fp32; of special codes anything."""
    if coding == "e4m3":
        return numbers.to(torch.uint8).view(torch.float8_e4m3fn).float()
    below, above = _smallest_codes(coding)
    return numbers.float().masked_fill_(numbers == below, -QUARTER).masked_fill_(numbers == above, QUARTER)


def _packed(numbers: Tensor, coding: Coding) -> Tensor:
    """Return rows of codes as bytes, 1-D."""
    if coding != "int4":
        return numbers.to(torch.uint8).view(-1)
    low, high = (numbers & 15).to(torch.uint8).chunk(2, 1)
    return (low | (high << 4)).view(-1)


def _unpacked(codes: Tensor, fmt: GroupFormat, numel: int) -> Tensor:
    """Return the codes in bytes: int32, (numel,)."""
    if fmt.coding == "e4m3":
        return codes.int()
    if fmt.coding == "int8":
        return codes.view(torch.int8).int()
    half = fmt.group_elements // 2
    rows = pad(codes, (0, -codes.numel() % half)).view(-1, half)
    nibbles = torch.cat((rows & 15, rows >> 4), 1).view(-1)[:numel]
    return (nibbles ^ 8).int() - 8


def _bit_numbers(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
