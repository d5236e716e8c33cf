"""Random bits that depend on nothing but what is rounded: the seed, the step and the element's offset.

Stochastic rounding with a generator makes results depend on how work is split: over threads, kernel launches,
devices or shards. Here the bits are a hash of a key and the element's offset in the logical parameter, and the
key is a hash of the optimiser's seed, the parameter's place in it and the step. So a resumed run rounds as the
uninterrupted one, and a shard as the whole.

Elements i and i + 64 of a block of 128 share one 32-bit word, high half and low half: kernels hold both at the
same time. The hash is a Weyl sequence, one xor-shift and two multiplications, modulo 2^32:

    x = offset * 0x7feb352d + key        word = (x ^ (x >> 15)) * 0x846ca68b

Source: the multipliers are those of the 32-bit hash "lowbias32" (Wellons, "Prospecting for Hash Functions",
2018, nullprogram.com).
"""

import torch
from torch import Tensor

MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
WEYL = 0x9E3779B9
MASK = 0xFFFFFFFF
# Bit 6 of an offset tells which half of its word an element gets.
PAIR_DISTANCE = 64
# Bits of the number 1 and of half a step above it: random bits go into the mantissa.
FIRST_UNIFORM, SECOND_UNIFORM = 0x3F800001, 0x3F800040
# Parameters are rounded with other bits than their moments.
PARAMETER_STREAM = 0x5BD1E995


def mixed(number: int) -> int:
    """Return a 32-bit hash of a number.

    Args:
        number: taken modulo 2^32.

    Returns:
        The hash, 0 to 2^32 - 1.

    Source: lowbias32, see the module.
    """
    number &= MASK
    number ^= number >> 16
    number = number * MULTIPLIER_1 & MASK
    number ^= number >> 15
    number = number * MULTIPLIER_2 & MASK
    return number ^ number >> 16


def seed_of(seed: int, index: int) -> int:
    """Return the seed of one parameter.

    Args:
        seed: the optimiser's.
        index: the parameter's place among all of the optimiser's, from 0.

    Returns:
        The seed, 0 to 2^32 - 1.
    """
    return (mixed(seed) + (index + 1) * WEYL) & MASK


def seed_at(seed: int, origin: int) -> int:
    """Return the seed of a piece of a parameter: its elements get the bits that they have in the whole.

    Where a piece of more than 2^32 elements is, the upper ones of it get other bits than in the whole.

    Args:
        seed: what `seed_of` gave.
        origin: offset of the piece's first element in the parameter, a multiple of 128.

    Returns:
        The seed in the lower 32 bits, and above it what the origin adds to a Weyl sequence; from -2^63 to 2^63 - 1.
    """
    shift = (origin * MULTIPLIER_1 + (origin >> 32) * WEYL) & MASK
    return signed(shift << 32 | seed & MASK)


def key_at(seed: int, step: int) -> int:
    """Return the key of one parameter's step.

    Args:
        seed: what `seed_of` or `seed_at` gave.
        step: 1 for the first.

    Returns:
        The key, 0 to 2^32 - 1 for a whole parameter; a piece's has its share of a Weyl sequence in the upper 32 bits.
    """
    return (seed >> 32 & MASK) << 32 | mixed(mixed(seed) + step * WEYL)


def signed(number: int) -> int:
    """Return the 64-bit integer that has the bits of a number from 0 to 2^64 - 1."""
    return number - 2**64 if number >= 2**63 else number


def words(key: int, start: int, stop: int, *, device: torch.device) -> Tensor:
    """Return the random word of each element start:stop, the half that is not its own included.

    Args:
        key: what `key_at` gave.
        start: offset of the first element in the logical parameter.
        stop: one past the last.
        device: where the words are wanted.

    Returns:
        int64, (stop - start,): numbers from 0 to 2^32 - 1.
    """
    pairs = torch.arange(start, stop, dtype=torch.int64, device=device) & ~PAIR_DISTANCE
    weyl = ((pairs & MASK) * MULTIPLIER_1 + (pairs >> 32) * WEYL + (key + (key >> 32) & MASK)) & MASK
    return ((weyl ^ (weyl >> 15)) * MULTIPLIER_2) & MASK


def halves(key: int, start: int, stop: int, *, device: torch.device) -> Tensor:
    """Return 16 random bits for each element start:stop.

    Args:
        key: what `key_at` gave.
        start: offset of the first element in the logical parameter.
        stop: one past the last.
        device: where the bits are wanted.

    Returns:
        int64, (stop - start,): numbers from 0 to 65535.
    """
    offsets = torch.arange(start, stop, dtype=torch.int64, device=device)
    word = words(key, start, stop, device=device)
    return torch.where((offsets & PAIR_DISTANCE) != 0, word & 0xFFFF, word >> 16)


def uniforms(key: int, start: int, stop: int, *, device: torch.device) -> Tensor:
    """Return a random number between 0 and 1 for each element start:stop, of 16 or 22 bits.

    Args:
        key: what `key_at` gave.
        start: offset of the first element in the logical parameter.
        stop: one past the last.
        device: where the numbers are wanted.

    Returns:
        fp32, (stop - start,): odd multiples of 2^-23 (first halves, from the whole word) or 2^-17 (second halves),
        so that they lie evenly around 1/2.
    """
    offsets = torch.arange(start, stop, dtype=torch.int64, device=device)
    word = words(key, start, stop, device=device)
    second = (offsets & PAIR_DISTANCE) != 0
    bits = torch.where(second, (word & 0xFFFF) << 7 | SECOND_UNIFORM, word >> 9 | FIRST_UNIFORM)
    return bits.to(torch.int32).view(torch.float32) - 1
