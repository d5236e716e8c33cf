"""The formats of optimiser states, as data: code values, block size, scale rule and bytes.

A moment of Adam costs four bytes per parameter in fp32. PyTorch can store it in fewer bits only by changing
its dtype, and a 4-bit number needs what a dtype does not have: a scale per group of elements and a table of
code values. So a format is a small frozen record: how a code stands for a number (`coding`), what an element
is divided by before it is rounded (`scale`) and how many elements share a scale. Everything else (kernels,
byte formulas, checkpoints) reads these records.

    coding     a code c stands for (times the element's scale)                    used for
    fp32       itself                                                             small tensors
    book       book.values[c]                                                     first moments, 4 bit
    root       ((c + 1) / 2^bits)^2, so never for zero                            second moments
    softsign   y / (2 - |y|), y = c / 127                                         first moments, 8 bit
    expanded   sign (e / 448)^(1/k), e = |float8_e4m3fn(c)|, k of its block       both moments, fp8
    factored   nothing is coded: row and column means only                        second moments

A second moment stands in a denominator, so no code but fp32's stands for zero there. Codes count parts of a scale:
where that is below 2^-118, as for gradients below 2e-18, they decode to the least part of it, or to zero.

Which format a tensor really gets is decided from its logical shape alone, never from a shard, a device or a
dtype: the same parameter has the same bits everywhere. Small tensors stay in fp32, whatever the parameter's
dtype is.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
sections 3 and 4, appendix E.2 (its code books) and algorithm 4 (rank-1 normalisation); Dettmers et al.,
"QLoRA", NeurIPS 2023 (arXiv 2305.14314), appendix E (NF4); Xi et al., "COAT", ICLR 2025 (arXiv 2410.19313),
section 4 (dynamic range expansion); Shazeer, Stern, "Adafactor", ICML 2018 (arXiv 1804.04235), section 3
(factored second moments). The root domain and the softsign follow the companding of arXiv 2602.23349.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from packlight.numerics.books import DYNAMIC_EXPONENT, LINEAR_WITHOUT_ZERO, NORMAL_FLOAT, CodeBook

# Source: Li et al. 2023, section 3: blocks of 128 elements for the first moment.
BLOCK_ELEMENTS = 128
# Groups of 32 with bf16 scales cost as much as blocks of 64 with fp32 ones and halve the error of the latter.
SMALL_BLOCK_ELEMENTS = 32
# Source: Li et al. 2023, appendix D.1: tensors of at most 4096 elements are not quantised.
MAX_FP32_ELEMENTS = 4096
# A row of a rank-1 scaled tensor has to fit into the step's smallest chunk, so that temporaries stay bounded.
MAX_RANK1_INNER_ELEMENTS = 2**18
# The step holds old and new rank-1 scales at once: this bounds the second copy to 4 MiB.
MAX_RANK1_SCALES = 2**20
# Rank-1 scales have to stay smaller than the codes that they scale: 4 bytes a scale, half a byte an element.
MIN_ELEMENTS_PER_RANK1_SCALE = 8
# A matrix scale stands for two steps, so it is 8 bytes: 64 elements a scale make an eighth of a byte each.
MIN_ELEMENTS_PER_MATRIX_SCALE = 64
# The step keeps a vector of column maxima per thread: this bounds each to 256 KiB.
MAX_MATRIX_COLUMNS = 2**16
# A block of 128 touches at most two rows.
MIN_MATRIX_COLUMNS = BLOCK_ELEMENTS

Coding = Literal["fp32", "book", "root", "softsign", "expanded", "factored"]
ScaleRule = Literal["none", "block", "matrix", "rank1", "factored"]


@dataclass(frozen=True)
class MomentFormat:
    """How one moment of an optimiser is stored: decode(x) = value(code(x)) * scale(x).

    Attributes:
        coding: what a code stands for (see the module).
        scale: "block": the largest magnitude in each block of `block_elements` in row-major order (the last
            block may be shorter); "matrix": blocks, after division by the least of the element's row and
            column maxima, as known one step before (see `second_moments`); "rank1": one vector of maxima per
            axis, and an element's scale is the least of its vectors' entries; "factored": a row and a column
            vector over the last two axes; "none": no scale.
        bits: bits of one code.
        block_elements: elements per block scale.
        book: the code values, where the coding is "book".
        scale_dtype: of block scales.
        signed: whether values below zero can be stored.
        deferred: of the rule "matrix": after a step the maxima are left as they were found, since those of other
            pieces of the parameter belong to them (see `second_moments`).
    """

    coding: Coding
    scale: ScaleRule
    bits: int = 4
    block_elements: int = BLOCK_ELEMENTS
    book: CodeBook | None = None
    scale_dtype: torch.dtype = torch.float32
    signed: bool = False
    deferred: bool = False

    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of each tensor that stores a moment, by the suffix of its name.

        Args:
            shape: the logical parameter's shape.

        Returns:
            "": the values themselves, in fp32; else "codes", "scale" and what else the format needs.
        """
        numel = math.prod(shape)
        if self.coding == "fp32":
            return {"": (tuple(shape), torch.float32)}
        if self.coding == "factored":
            row, column = tuple(shape[:-1]), (*shape[:-2], shape[-1])
            return {"row": (row, torch.float32), "col": (column, torch.float32)}
        code_dtype = torch.int8 if self.coding == "softsign" else torch.uint8
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
        tensors = {"codes": ((self._code_bytes(numel),), code_dtype)}
        if self.scale == "rank1":
            return tensors | {f"scale_{axis}": ((length,), torch.float32) for axis, length in enumerate(shape)}
        num_blocks = math.ceil(numel / self.block_elements)
        tensors["scale"] = ((num_blocks,), self.scale_dtype)
        if self.coding == "expanded":
            tensors["power"] = ((num_blocks,), torch.uint8)
        if self.scale == "matrix":
            rows, columns = matrix_view(shape) or (math.prod(shape[:-1]), shape[-1])
            tensors |= {"rows": ((2, rows), torch.float32), "cols": ((2, columns), torch.float32)}
        return tensors

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes that a moment of that shape takes."""
        return sum(math.prod(size) * dtype.itemsize for size, dtype in self.tensors(shape).values())

    def _code_bytes(self, numel: int) -> int:
        if self.bits == 8:
            return numel
        whole, rest = divmod(numel, BLOCK_ELEMENTS)
        return whole * (BLOCK_ELEMENTS // 2) + min(rest, BLOCK_ELEMENTS // 2)


@dataclass(frozen=True)
class StateFormat:
    """A named pair of moment formats, with the fall-back where matrix or rank-1 scales do not apply.

    Attributes:
        name: the name that users write.
        exp_avg: format of the first moment.
        exp_avg_sq: format of the second moment.
        exp_avg_sq_flat: format of the second moment of tensors that the other does not suit (see `suits`).
    """

    name: str
    exp_avg: MomentFormat
    exp_avg_sq: MomentFormat
    exp_avg_sq_flat: MomentFormat


FP32 = MomentFormat("fp32", "none", bits=32, signed=True)
NORMAL_BLOCKS = MomentFormat("book", "block", book=NORMAL_FLOAT, signed=True)
DYNAMIC_BLOCKS = MomentFormat("book", "block", book=DYNAMIC_EXPONENT, signed=True)
LINEAR_BLOCKS = MomentFormat("book", "block", book=LINEAR_WITHOUT_ZERO)
LINEAR_RANK1 = MomentFormat("book", "rank1", book=LINEAR_WITHOUT_ZERO)
ROOT_BLOCKS = MomentFormat("root", "block")
ROOT_MATRIX = MomentFormat("root", "matrix")
ROOT_MATRIX_PIECE = MomentFormat("root", "matrix", deferred=True)
ROOT_8BIT = MomentFormat("root", "block", 8, SMALL_BLOCK_ELEMENTS, scale_dtype=torch.bfloat16)
SOFTSIGN_8BIT = MomentFormat("softsign", "block", 8, SMALL_BLOCK_ELEMENTS, scale_dtype=torch.bfloat16, signed=True)
EXPANDED_SIGNED = MomentFormat("expanded", "block", 8, signed=True)
EXPANDED = MomentFormat("expanded", "block", 8)
FACTORED = MomentFormat("factored", "factored", bits=0)

FORMATS: Mapping[str, StateFormat] = MappingProxyType(
    {
        each.name: each
        for each in (
            StateFormat("fp32", FP32, FP32, FP32),
            StateFormat("4bit", NORMAL_BLOCKS, ROOT_MATRIX, ROOT_BLOCKS),
            StateFormat("8bit", SOFTSIGN_8BIT, ROOT_8BIT, ROOT_8BIT),
            StateFormat("fp8", EXPANDED_SIGNED, EXPANDED, EXPANDED),
            StateFormat("paper4bit", DYNAMIC_BLOCKS, LINEAR_RANK1, LINEAR_BLOCKS),
            StateFormat("factored", DYNAMIC_BLOCKS, FACTORED, LINEAR_BLOCKS),
        )
    }
)

PIECE_FORMATS: Mapping[tuple[MomentFormat, MomentFormat], str] = MappingProxyType(
    {
        (FP32, FP32): "fp32",
        (NORMAL_BLOCKS, ROOT_MATRIX): "4bit/matrix",
        (NORMAL_BLOCKS, ROOT_BLOCKS): "4bit/blocks",
        (SOFTSIGN_8BIT, ROOT_8BIT): "8bit/blocks",
        (EXPANDED_SIGNED, EXPANDED): "fp8/blocks",
    }
)
"""What a piece of a parameter is stored as that has these formats as a whole: its own shape says nothing."""

MATRIX_PIECE = PIECE_FORMATS[NORMAL_BLOCKS, ROOT_MATRIX]
"""The one of these whose maxima are of all pieces."""

_MOMENTS_OF_PIECES = {name: moments for moments, name in PIECE_FORMATS.items() if name != "fp32"} | {
    MATRIX_PIECE: (NORMAL_BLOCKS, ROOT_MATRIX_PIECE)
}


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
def _matrix_view(shape: tuple[int, ...]) -> tuple[int, int] | None:
    numel = math.prod(shape)
    splits = [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, len(shape))]
    suited = [
        (rows, columns)
        for rows, columns in splits
        if MIN_MATRIX_COLUMNS <= columns <= MAX_MATRIX_COLUMNS
        and rows > 1
        and (rows + columns) * MIN_ELEMENTS_PER_MATRIX_SCALE <= numel
    ]
    return min(suited, key=sum, default=None)


def matrix_view(shape: Sequence[int]) -> tuple[int, int] | None:
    """Return the matrix that a tensor is to the rule "matrix": its axes cut in two where that takes least scales.

    Args:
        shape: the logical parameter's shape.

    Returns:
        Rows and columns, or None where row and column maxima do not pay.
    """
    return _matrix_view(tuple(shape))


def suits(moment: MomentFormat, shape: Sequence[int]) -> bool:
    """Tell whether a second moment's format suits a tensor of that shape; otherwise blocks take its place."""
    if moment.scale == "matrix":
        return matrix_view(shape) is not None
    if moment.scale == "factored":
        return len(shape) >= 2
    return moment.scale != "rank1" or suits_rank1(shape)


@functools.cache
def moment_formats(name: str, shape: tuple[int, ...]) -> tuple[MomentFormat, MomentFormat]:
    """Return what a parameter of that shape really gets under a state format.

    Args:
        name: a key of `FORMATS`, or a value of `PIECE_FORMATS`.
        shape: the logical parameter's shape (not a shard's); a piece's has no say.

    Returns:
        The formats of exp_avg and exp_avg_sq; fp32 for both where the tensor has at most 4096 elements.

    Raises:
        ValueError: no format has that name.
    """
    if name in _MOMENTS_OF_PIECES:
        return _MOMENTS_OF_PIECES[name]
    chosen = state_format(name)
    if math.prod(shape) <= MAX_FP32_ELEMENTS:
        return FP32, FP32
    return chosen.exp_avg, chosen.exp_avg_sq if suits(chosen.exp_avg_sq, shape) else chosen.exp_avg_sq_flat
