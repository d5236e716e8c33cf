"""Codes: from ratios to codes and back, and two 4-bit codes a byte.

PyTorch has no 4-bit dtype, and its `bucketize` is a binary search per element that takes more time than the
rest of an optimiser step together. Here a table over 1024 cells of the range guesses the code, and one exact
comparison settles it: no cell holds two borders.

4-bit codes lie in blocks of 128: the low nibble of byte i is element i, the high nibble element i + 64, so that
a vector unit unpacks them with one mask and one shift. A last block of fewer than 64 elements takes a byte each.

Stochastic rounding takes the next value below or above, in such proportion that the expected value is the
number itself (of a root: the root): without that a second moment at beta2 = 0.999 stalls, since a step changes it by
less than half a code.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 2; Xi et al., "COAT", ICLR 2025 (arXiv 2410.19313), section 4.1.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from packlight.numerics.books import CodeBook, expanded_tables

# Fine enough that no cell, with its slack, holds two borders (asserted where the tables are made).
GUESS_CELLS = 1024
BLOCK = 128
HALF = BLOCK // 2
SIGN_BIT = 0x80


def pack(codes: Tensor) -> Tensor:
    """Put two codes into each byte.

    Args:
        codes: uint8, (n,): values below 16.

    Returns:
        uint8, (64 floor(n / 128) + min(64, n mod 128),): low nibbles are the first halves of blocks.
    """
    rest = codes.numel() % BLOCK
    halves = (pad(codes, (0, BLOCK - rest)) if rest else codes).view(-1, 2, HALF)
    packed = (halves[:, 0] | (halves[:, 1] << 4)).view(-1)
    return packed[: packed.numel() - HALF + min(rest, HALF)] if rest else packed


def unpack(codes: Tensor, numel: int) -> Tensor:
    """Return one code an element.

    Args:
        codes: uint8, 1-D: two codes a byte.
        numel: the number of elements.

    Returns:
        uint8, (numel,): a new tensor.
    """
    rest = codes.numel() % HALF
    halves = (pad(codes, (0, HALF - rest)) if rest else codes).view(-1, HALF)
    return torch.stack((halves & 15, halves >> 4), 1).view(-1)[:numel]


def nearest_codes(ratios: Tensor, book: CodeBook) -> Tensor:
    """Return the code of the nearest value of a book.

    code = bucketize(ratio, borders): of two equally near values the lower one. A NaN gets any code.

    Args:
        ratios: fp32, (n,): in units of 1 / book.span, so from -book.span to book.span.
        book: the values.

    Returns:
        uint8, (n,): one code an element.
    """
    guesses, upper = _guess_tables(book, ratios.device)
    low, high = _bounds(book)
    # A NaN becomes an arbitrary int32: the clamp comes after the cast.
    cells = ((ratios - low) * (GUESS_CELLS / (high - low))).to(torch.int32).clamp_(0, GUESS_CELLS - 1)
    guess = guesses.index_select(0, cells)
    above = ratios > upper.index_select(0, guess)
    return guess.to(torch.uint8).add_(above)


def book_values(codes: Tensor, book: CodeBook) -> Tensor:
    """Return what codes of a book stand for.

    Args:
        codes: uint8, (n,): one code an element.
        book: the values.

    Returns:
        fp32, (n,): a new tensor.
    """
    return _book_table(book, codes.device).index_select(0, codes.int())


def root_codes(levels: Tensor, uniforms: Tensor | None) -> Tensor:
    """Return the codes of square roots: code c stands for the level c + 1.

    Nearest is nearest in the root. Stochastic rounding is nearest, too, after a shift by a random number between
    -1/2 and 1/2, so it is unbiased in the root, because the update divides by the root. The square it stands for is
    too large then, by about half of 1 / level: 30 % at level 2, 4 % at level 12. Being unbiased in the square is worse
    where it matters: with the square rule the mean update comes out 24 % too large at level 2 and 3 % at level 12,
    with this one 6 % and 1 % (simulated, at beta2 = 0.99 and 0.999 alike; a test holds the order).

    Args:
        levels: fp32, (n,): roots in units of a level, below the number of levels; those below 1 become 1.
        uniforms: fp32, (n,): random numbers between 0 and 1; None: nearest.

    Returns:
        uint8, (n,): one code an element.
    """
    if uniforms is not None:
        levels = levels + (uniforms - 0.5)
    return torch.round(torch.where(levels > 1, levels, 1.0) - 1).to(torch.uint8)


def softsign_codes(ratios: Tensor) -> Tensor:
    """Return the nearest codes of y = 2 x / (1 + |x|), in units of 1 / 127.

    Args:
        ratios: fp32, (n,): x, from -1 to 1.

    Returns:
        int8, (n,): codes from -127 to 127.
    """
    levels = torch.round(ratios * 254.0 / (ratios.abs() + 1))
    return torch.where(levels.isnan(), 0.0, levels).to(torch.int8)


def softsign_values(codes: Tensor) -> Tensor:
    """Return x = y / (2 - |y|) of codes y in units of 1 / 127.

    Args:
        codes: int8, (n,).

    Returns:
        fp32, (n,): from -1 to 1.
    """
    levels = codes.float()
    return levels / (254.0 - levels.abs())


def expansion_power(largest: Tensor, smallest: Tensor) -> Tensor:
    """Return the largest power j / 16 whose expanded range still fits into E4M3.

    Args:
        largest: fp32, (blocks,): largest magnitude.
        smallest: fp32, (blocks,): smallest magnitude that has to keep its distance from the largest; inf: none.

    Returns:
        uint8, (blocks,): j, from 16 to 255.
    """
    limits = expanded_tables(largest.device)[2]
    ratio = (largest / smallest)[:, None]
    return 15 + (ratio <= limits[None, 16:]).sum(1, dtype=torch.int32).clamp_(min=1).to(torch.uint8)


def expanded_codes(ratios: Tensor, powers: Tensor, uniforms: Tensor | None, *, signed: bool) -> Tensor:
    """Return the E4M3 codes of ratios that are expanded by the power of their block.

    Nearest is nearest in E4M3, after expansion. Stochastic rounding is unbiased in the ratio. Unsigned codes
    start at 1, so that no ratio becomes zero.

    Args:
        ratios: fp32, (blocks, n): from -1 to 1.
        powers: uint8, (blocks,): in sixteenths.
        uniforms: fp32, (blocks, n): random numbers between 0 and 1; None: nearest.
        signed: whether ratios below zero come.

    Returns:
        uint8, (blocks, n): the bits of float8_e4m3fn numbers.
    """
    values, borders, _ = expanded_tables(ratios.device)
    rows = powers.long()
    magnitudes = ratios.abs().nan_to_num_(0.0)
    if uniforms is None:
        codes = torch.searchsorted(borders[rows], magnitudes)
    else:
        codes = torch.searchsorted(values[rows][:, 1:127].contiguous(), magnitudes, right=True)
        below = values[rows].gather(1, codes)
        above = values[rows].gather(1, (codes + 1).clamp_(max=126))
        codes = codes + (magnitudes - below > uniforms * (above - below))
    codes = codes.clamp_(0 if signed else 1, 126)
    if signed:
        codes = torch.where(ratios < 0, codes | SIGN_BIT, codes)
    return codes.to(torch.uint8)


def expanded_values(codes: Tensor, powers: Tensor) -> Tensor:
    """Return the ratios of expanded E4M3 codes.

    Args:
        codes: uint8, (blocks, n): the bits of float8_e4m3fn numbers.
        powers: uint8, (blocks,): in sixteenths.

    Returns:
        fp32, (blocks, n): from -1 to 1.
    """
    values = expanded_tables(codes.device)[0][powers.long()].gather(1, (codes & ~SIGN_BIT).long())
    return torch.where((codes & SIGN_BIT) != 0, -values, values)


def square_root(values: Tensor) -> Tensor:
    """Return the correctly rounded square root.

    torch.sqrt may be off by one unit in the last place where it calls a vendor's library. A root in double
    precision, rounded to fp32, is exact: 53 bits are more than twice 24.

    Args:
        values: fp32, any shape.

    Returns:
        fp32, the same shape: a new tensor.
    """
    return values.double().sqrt_().float()


def _bounds(book: CodeBook) -> tuple[float, float]:
    return (-book.span if book.values[0] < 0 else 0.0, book.span)


@functools.cache
def _book_table(book: CodeBook, device: torch.device) -> Tensor:
    return torch.tensor(book.values, dtype=torch.float32, device=device)


@functools.cache
def _guess_tables(book: CodeBook, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each cell's least code, int32, and each code's upper border, fp32 (the last has none)."""
    low, high = _bounds(book)
    width, slack = (high - low) / GUESS_CELLS, 1e-5 * book.span
    edges = [low + i * width for i in range(GUESS_CELLS + 1)]
    least = [sum(border < edge - slack for border in book.borders) for edge in edges]
    most = [sum(border < edge + slack for border in book.borders) for edge in edges]
    assert all(after - before <= 1 for before, after in zip(least, most[1:], strict=False)), "cells are too wide"
    guesses = torch.tensor(least[:-1], dtype=torch.int32, device=device)
    return guesses, torch.tensor([*book.borders, math.inf], dtype=torch.float32, device=device)
