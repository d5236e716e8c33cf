"""Code books: the numbers that codes stand for.

A 4-bit code is an index into 16 values, chosen so that the values are dense where the numbers are. A kernel has
to find the nearest value for every element of every step, and neither a search nor a gather is fast enough for
that. So a book can scale its values such that every number's nearest integer names a cell with at most one
border in it: one table of 32 cells gives the border, and the code below it stands in the border's own lowest
bits (which shift it by at most 15 units in the last place). That makes a nearest code one rounding, one table
look-up and one comparison.

    x * span -> cell = round(x) + 15 -> border = cells[cell] -> code = border & 15, plus 1 if x is above it

FP8 codes with dynamic range expansion are a book too, one for each power 1/k.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 4.1, appendix E.2; Dettmers et al., "QLoRA", NeurIPS 2023 (arXiv 2305.14314), appendix E (NF4); Xi et
al., "COAT", ICLR 2025 (arXiv 2410.19313), section 4.
"""

import functools
import math
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

# Books with tagged borders scale their values to -15..15: the nearest integer tells the cell of a border.
BORDER_SPAN = 15.0
# float8_e4m3fn: 448 is its largest number, and code 127 is a NaN.
E4M3_MAX = 448.0
NUM_E4M3_MAGNITUDES = 127
# Powers are k = j / 16 with j in one byte. Source: COAT's expand_min of 16.
POWER_UNIT = 16
MAX_POWER = 255


@dataclass(frozen=True)
class CodeBook:
    """The values that a code can stand for, in ascending order: code i stands for `values[i]`.

    Attributes:
        name: what error messages call it.
        values: ascending, within [-1, 1]; a power of two of them.
        span: ratios are multiplied by it before they meet the borders.
    """

    name: str
    values: tuple[float, ...]
    span: float = 1.0

    @property
    def bits(self) -> int:
        """Return the bits of one code."""
        return (len(self.values) - 1).bit_length()

    @property
    def midpoints(self) -> tuple[float, ...]:
        """Return the borders between values: x gets code i if midpoints[i-1] < x <= midpoints[i]."""
        return tuple((low + high) / 2 for low, high in zip(self.values, self.values[1:], strict=False))

    @functools.cached_property
    def borders(self) -> tuple[float, ...]:
        """Return the borders that scaled ratios meet, fp32 numbers.

        With a span of 1 they are the midpoints. Otherwise the four lowest bits of border i hold the code i
        below it: a kernel then finds border and code in one table.
        """
        if self.span == 1.0:
            return self.midpoints
        return tuple(_tagged(middle * self.span, code) for code, middle in enumerate(self.midpoints))

    @functools.cached_property
    def cells(self) -> tuple[int, ...]:
        """Return, for each of 32 cells round(x) + 15 of scaled ratios, the bits of its border or of a tagged inf.

        No cell holds two borders (asserted). A tagged inf is a NaN to a comparison: nothing is above it.
        """
        cells = []
        for cell in range(32):
            low = cell - BORDER_SPAN - 0.5
            inside = [border for border in self.borders if low <= border < low + 1]
            assert len(inside) <= 1, "a cell holds two borders"
            code = sum(border < low for border in self.borders)
            cells.append(_bits(inside[0]) if inside else _bits(math.inf) | code)
        return tuple(cells)


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _tagged(value: float, code: int) -> float:
    return float(struct.unpack("<f", struct.pack("<i", _bits(value) & ~15 | code))[0])


def dynamic_exponent_values() -> tuple[float, ...]:
    """Return the 16 values of the signed 4-bit dynamic exponent map.

    value = +-10^-E * f, E = 0, 1, 2, where f runs over the midpoints of linspace(0.1, 1, 2^F + 1) with F = 2
    - E fraction bits; besides them 0 and 1 (there is no -1: the 14 signed values, 0 and 1 make 16).

    Returns:
        The values in ascending order.

    Source: Li et al. 2023, appendix E.2.
    """
    magnitudes = []
    for exponent in range(3):
        num_fractions = 2 ** (2 - exponent)
        width = 0.9 / num_fractions
        magnitudes += [10.0**-exponent * (0.1 + (i + 0.5) * width) for i in range(num_fractions)]
    return tuple(sorted([0.0, 1.0, *magnitudes, *(-value for value in magnitudes)]))


def linear_values_without_zero() -> tuple[float, ...]:
    """Return the 16 values (i + 1) / 16 of the unsigned linear map.

    Zero is left out because the second moment stands in a denominator: an element rounded to zero would get
    the update m/eps.

    Returns:
        The values in ascending order.

    Source: Li et al. 2023, section 4.1.
    """
    return tuple((i + 1) / 16 for i in range(16))


# Source: Dettmers et al. 2023 (QLoRA), appendix E: quantiles of a normal distribution, scaled to [-1, 1].
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NORMAL_FLOAT = CodeBook("normal float, 4 bit", NF4_VALUES, span=BORDER_SPAN)
DYNAMIC_EXPONENT = CodeBook("signed dynamic exponent, 4 bit", dynamic_exponent_values())
LINEAR_WITHOUT_ZERO = CodeBook("unsigned linear without zero, 4 bit", linear_values_without_zero())


def e4m3_magnitudes() -> tuple[float, ...]:
    """Return the 127 non-negative numbers of float8_e4m3fn, code i at index i."""
    codes = torch.arange(NUM_E4M3_MAGNITUDES, dtype=torch.uint8)
    return tuple(codes.view(torch.float8_e4m3fn).float().tolist())


@functools.cache
def expanded_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return what FP8 codes stand for under each power k = j / 16, as parts of the block's maximum.

    value = (e / 448)^(1/k) for the E4M3 number e; the border between two codes is their midpoint in E4M3, to
    the same power. A block takes the largest k at which its range still fits: max / min <= (448^2 / 2)^(1/k).

    Args:
        device: where the tables are wanted.

    Returns:
        values: fp32, (256, 128), row j for k = j / 16; the last column repeats 1.
        borders: fp32, (256, 128): of codes i and i + 1; the last two columns are inf.
        limits: fp32, (256,): the largest max / min for power j; inf up to j = 16.

    Source: COAT (arXiv 2410.19313), section 4.1.
    """
    powers = torch.arange(256, dtype=torch.float64).clamp_(min=POWER_UNIT) / POWER_UNIT
    magnitudes = torch.tensor(e4m3_magnitudes(), dtype=torch.float64) / E4M3_MAX
    values = magnitudes[None, :] ** (1 / powers[:, None])
    borders = ((magnitudes[1:] + magnitudes[:-1]) / 2)[None, :] ** (1 / powers[:, None])
    limits = (E4M3_MAX**2 / 2) ** (1 / powers)
    limits[: POWER_UNIT + 1] = math.inf
    values = torch.nn.functional.pad(values, (0, 1), value=1.0)
    borders = torch.nn.functional.pad(borders, (0, 2), value=math.inf)
    return values.float().to(device), borders.float().to(device), limits.float().to(device)
