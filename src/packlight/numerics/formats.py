"""The formats of optimiser states, as data: code values, block size, scale rule and bytes.

A moment of Adam costs four bytes per parameter in fp32. PyTorch can store it in fewer bits only by changing
its dtype, and a 4-bit number needs what a dtype does not have: a scale per group of elements and a table of
code values. So a format is a small frozen record: a `CodeBook` (which values a code can stand for), a scale
rule (what an element is divided by before it is rounded to the book) and a block size. Everything else
(kernels, byte formulas, checkpoints) reads these records.

Which format a tensor really gets is decided from its logical shape alone, never from a shard, a device or a
dtype: the same parameter has the same bits everywhere. Small tensors stay in fp32, whatever the parameter's
dtype is.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
sections 3 and 4, appendix E.2 (the code books) and algorithm 4 (rank-1 normalisation).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# Source: Li et al. 2023, section 3: blocks of 128 elements for the first moment.
BLOCK_ELEMENTS = 128
# Source: Li et al. 2023, appendix D.1: tensors of at most 4096 elements are not quantised.
MAX_FP32_ELEMENTS = 4096
# A row of a rank-1 scaled tensor has to fit into the step's smallest chunk, so that temporaries stay bounded.
MAX_RANK1_INNER_ELEMENTS = 2**18
# The step holds old and new rank-1 scales at once: this bounds the second copy to 4 MiB.
MAX_RANK1_SCALES = 2**20
# Rank-1 scales have to stay smaller than the codes that they scale: 4 bytes a scale, half a byte an element.
MIN_ELEMENTS_PER_RANK1_SCALE = 8

ScaleRule = Literal["none", "block", "rank1"]


@dataclass(frozen=True)
class CodeBook:
    """The values that a code can stand for, in ascending order: code i stands for `values[i]`.

    Attributes:
        name: what error messages call it.
        values: ascending, within [-1, 1]; a power of two of them.
    """

    name: str
    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Return the bits of one code."""
        return (len(self.values) - 1).bit_length()

    @property
    def midpoints(self) -> tuple[float, ...]:
        """Return the borders between values: x gets code i if midpoints[i-1] < x <= midpoints[i]."""
        return tuple((low + high) / 2 for low, high in zip(self.values, self.values[1:], strict=False))


@dataclass(frozen=True)
class MomentFormat:
    """How one moment of an optimiser is stored: decode(x) = book[code(x)] * scale(x).

    Attributes:
        book: the code values; None: fp32 as it is.
        scale: "block": the largest magnitude in each block of `block_elements` in row-major order (the last
            block may be shorter); "rank1": one vector of maxima per axis, and an element's scale is the least
            of its vectors' entries; "none": no scale.
        block_elements: elements per block scale.
    """

    book: CodeBook | None
    scale: ScaleRule
    block_elements: int = BLOCK_ELEMENTS

    def codes_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the codes: the tensor's own in fp32, else 1-D with two 4-bit codes a byte."""
        if self.book is None:
            return tuple(shape)
        return (math.ceil(math.prod(shape) * self.book.bits / 8),)

    def code_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of the codes of a tensor of that shape."""
        return math.prod(self.codes_shape(shape)) * (4 if self.book is None else 1)

    def scale_shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the shape of each fp32 scale tensor."""
        if self.scale == "block":
            return ((math.ceil(math.prod(shape) / self.block_elements),),)
        if self.scale == "rank1":
            return tuple((length,) for length in shape)
        return ()

    def scale_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of all scales of a tensor of that shape."""
        return sum(4 * math.prod(scale) for scale in self.scale_shapes(shape))


@dataclass(frozen=True)
class StateFormat:
    """A named pair of moment formats, with the fall-back where rank-1 scales do not apply.

    Attributes:
        name: the name that users write.
        exp_avg: format of the first moment.
        exp_avg_sq: format of the second moment.
        exp_avg_sq_flat: format of the second moment of tensors that rank-1 scales do not suit (see
            `suits_rank1`).
    """

    name: str
    exp_avg: MomentFormat
    exp_avg_sq: MomentFormat
    exp_avg_sq_flat: MomentFormat


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


DYNAMIC_EXPONENT = CodeBook("signed dynamic exponent, 4 bit", dynamic_exponent_values())
LINEAR_WITHOUT_ZERO = CodeBook("unsigned linear without zero, 4 bit", linear_values_without_zero())
FP32 = MomentFormat(book=None, scale="none")

FORMATS: Mapping[str, StateFormat] = MappingProxyType(
    {
        "fp32": StateFormat("fp32", exp_avg=FP32, exp_avg_sq=FP32, exp_avg_sq_flat=FP32),
        "paper4bit": StateFormat(
            "paper4bit",
            exp_avg=MomentFormat(DYNAMIC_EXPONENT, "block"),
            exp_avg_sq=MomentFormat(LINEAR_WITHOUT_ZERO, "rank1"),
            exp_avg_sq_flat=MomentFormat(LINEAR_WITHOUT_ZERO, "block"),
        ),
    }
)


def state_format(name: str) -> StateFormat:
    """Return the state format of that name.

    Args:
        name: a key of `FORMATS`.

    Returns:
        The format.

    Raises:
        ValueError: no format has that name.
    """
    if name not in FORMATS:
        raise ValueError(
            f"unknown state format {name!r}; wanted one of {', '.join(map(repr, FORMATS))}. "
            "Pass one of these names, or 'fp32' to leave the states as they are."
        )
    return FORMATS[name]


def suits_rank1(shape: Sequence[int]) -> bool:
    """Tell whether rank-1 scales suit a tensor: two axes or more, short rows, far fewer scales than elements.

    Args:
        shape: the logical parameter's shape.

    Returns:
        True where the second moment gets rank-1 scales, False where it falls back to blocks.
    """
    numel, num_scales = math.prod(shape), sum(shape)
    return (
        len(shape) >= 2
        and numel <= MAX_RANK1_INNER_ELEMENTS * shape[0]
        and num_scales <= min(MAX_RANK1_SCALES, numel // MIN_ELEMENTS_PER_RANK1_SCALE)
    )


@functools.cache
def moment_formats(name: str, shape: tuple[int, ...]) -> tuple[MomentFormat, MomentFormat]:
    """Return what a parameter of that shape really gets under a state format.

    Args:
        name: a key of `FORMATS`.
        shape: the logical parameter's shape (not a shard's).

    Returns:
        The formats of exp_avg and exp_avg_sq; fp32 for both where the tensor has at most 4096 elements.

    Raises:
        ValueError: no format has that name.
    """
    chosen = state_format(name)
    if math.prod(shape) <= MAX_FP32_ELEMENTS:
        return FP32, FP32
    return chosen.exp_avg, chosen.exp_avg_sq if suits_rank1(shape) else chosen.exp_avg_sq_flat
