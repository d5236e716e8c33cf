"""Codes: the nearest value of a book, two codes a byte, and back.

PyTorch has no 4-bit dtype, and its `bucketize` is a binary search per element that takes more time than the
rest of an optimiser step together. Here a table over 1024 cells of the range guesses the code, and one exact
comparison settles it: no cell holds two midpoints. Unpacking looks a byte up in a table of 256 pairs of
values.

The layout is the published one: the low nibble of byte i is element 2 i, the high nibble element 2 i + 1.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
section 2.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from packlight.numerics.formats import CodeBook

# Fine enough that no cell, with its slack, holds two midpoints (asserted where the tables are made).
GUESS_CELLS = 1024


def nearest_codes(ratios: Tensor, book: CodeBook) -> Tensor:
    """Return the code of the nearest value of a book.

    code = bucketize(ratio, midpoints): of two equally near values the lower one. A NaN gets the lowest
    cell's.

    Args:
        ratios: fp32, (n,): within the book's range.
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


def pack(codes: Tensor) -> Tensor:
    """Put two codes into each byte.

    Args:
        codes: uint8, (n,): values below 16.

    Returns:
        uint8, (ceil(n / 2),): the low nibble is the even element; an odd tail has a zero beside it.
    """
    even = pad(codes, (0, 1)) if codes.numel() % 2 else codes
    return even[0::2] | (even[1::2] << 4)


def unpacked_values(codes: Tensor, book: CodeBook) -> Tensor:
    """Return the book's values for packed codes.

    Args:
        codes: uint8, (n,): two codes a byte.
        book: what the codes stand for.

    Returns:
        fp32, (2 n,): a new tensor.
    """
    return _pair_table(book, codes.device).index_select(0, codes.int()).view(torch.float32)


def _bounds(book: CodeBook) -> tuple[float, float]:
    return (-1.0, 1.0) if book.values[0] < 0 else (0.0, 1.0)


@functools.cache
def _pair_table(book: CodeBook, device: torch.device) -> Tensor:
    """Return each byte's two fp32 values, low nibble first, as one 8-byte number that is only copied."""
    pairs = [value for high in book.values for low in book.values for value in (low, high)]
    return torch.tensor(pairs, dtype=torch.float32, device=device).view(torch.int64)


@functools.cache
def _guess_tables(book: CodeBook, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each cell's least code, int32, and each code's upper border, fp32 (the last has none)."""
    low, high = _bounds(book)
    width, slack = (high - low) / GUESS_CELLS, 1e-5
    edges = [low + i * width for i in range(GUESS_CELLS + 1)]
    least = [sum(middle < edge - slack for middle in book.midpoints) for edge in edges]
    most = [sum(middle < edge + slack for middle in book.midpoints) for edge in edges]
    assert all(after - before <= 1 for before, after in zip(least, most[1:], strict=False)), "cells are too wide"
    guesses = torch.tensor(least[:-1], dtype=torch.int32, device=device)
    return guesses, torch.tensor([*book.midpoints, math.inf], dtype=torch.float32, device=device)
