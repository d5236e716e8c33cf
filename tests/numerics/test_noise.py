"""Random bits hang on seed, step and offset alone, and are as random as rounding needs."""

import pytest
import torch

from packlight.numerics.noise import MASK, halves, key_at, mixed, seed_of, uniforms, words

CPU = torch.device("cpu")
#: An average of independent bits is within this many standard deviations; beyond it lies one run in 10^9.
DEVIATIONS = 6.1


def word(key: int, offset: int) -> int:
    """The formula of the module, in Python's integers."""
    pair = offset & ~64
    x = ((pair & MASK) * 0x7FEB352D + (pair >> 32) * 0x9E3779B9 + key) & MASK
    return (x ^ (x >> 15)) * 0x846CA68B & MASK


@pytest.mark.parametrize("start", [0, 100, 2**31 - 100, 2**32 - 128, 2**33 + 640, 2**40])
def test_words_are_those_of_the_formula_at_any_offset(start: int, seed: int) -> None:
    key = key_at(seed, 3)
    expected = [word(key, offset) for offset in range(start, start + 300)]
    assert words(key, start, start + 300, device=CPU).tolist() == expected
    bits = [w & 0xFFFF if offset & 64 else w >> 16 for offset, w in enumerate(expected, start)]
    assert halves(key, start, start + 300, device=CPU).tolist() == bits


def test_a_range_of_the_bits_is_a_part_of_the_whole(seed: int) -> None:
    whole_words, whole = words(seed, 0, 5000, device=CPU), uniforms(seed, 0, 5000, device=CPU)
    for start, stop in ((0, 1), (64, 65), (777, 2001), (4999, 5000), (30, 30)):
        assert torch.equal(words(seed, start, stop, device=CPU), whole_words[start:stop])
        assert torch.equal(uniforms(seed, start, stop, device=CPU), whole[start:stop])


def test_elements_64_apart_share_a_word_and_no_others_do(seed: int) -> None:
    drawn = words(seed & MASK, 0, 2**14, device=CPU).view(-1, 2, 64)
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert drawn[:, 0].unique().numel() > 2**13 - 64  # 8192 of 2^32: eight coincide once in 1e13 runs or so


@pytest.mark.parametrize("step", [1, 2, 1000])
def test_uniform_numbers_are_uniform(step: int, seed: int) -> None:
    number = 2**18
    drawn = uniforms(key_at(seed_of(seed, 0), step), 0, number, device=CPU).double()
    assert float(drawn.min()) > 0
    assert float(drawn.max()) < 1
    odd = drawn.view(-1, 2, 64) * torch.tensor([[2**23], [2**17]]) % 2
    assert bool((odd == 1).all())  # evenly around 1/2
    # Variances: of a uniform number 1/12, of its square 4/45. Elements that share a word share bits, so count half.
    deviation = DEVIATIONS / (number / 2) ** 0.5
    assert abs(float(drawn.mean()) - 0.5) < deviation * (1 / 12) ** 0.5 + 2**-16
    assert abs(float(drawn.square().mean()) - 1 / 3) < deviation * (4 / 45) ** 0.5 + 2**-16


def test_each_of_the_bits_is_set_half_of_the_time(seed: int) -> None:
    drawn = halves(key_at(seed_of(seed, 1), 1), 0, 2**18, device=CPU)
    shares = torch.stack([(drawn >> bit & 1).double().mean() for bit in range(16)])
    assert float((shares - 0.5).abs().max()) < DEVIATIONS * 0.5 / 2**9


@pytest.mark.parametrize("distance", [1, 2, 63, 64, 128, 4096])
def test_numbers_at_a_distance_are_not_correlated(distance: int, seed: int) -> None:
    drawn = uniforms(key_at(seed_of(seed, 0), 1), 0, 2**18, device=CPU).double() - 0.5
    correlation = float((drawn[:-distance] * drawn[distance:]).mean() * 12)
    assert abs(correlation) < DEVIATIONS / 2**8.5 + 2**-15


def test_steps_and_parameters_have_keys_of_their_own(seed: int) -> None:
    keys = {key_at(seed_of(seed, index), step) for index in range(100) for step in range(1, 101)}
    assert len(keys) > 10_000 - 10  # 10,000 of 2^32 coincide 0.01 times
    assert all(0 <= key <= MASK for key in keys)
    assert len({seed_of(seed, index) for index in range(1000)}) == 1000


def test_seeds_of_any_size_are_taken_modulo_2_to_the_32() -> None:
    assert seed_of(2**40 + 5, 0) == seed_of(5, 0)
    assert seed_of(-1, 0) == seed_of(MASK, 0)


def test_the_hash_is_the_published_one() -> None:
    """lowbias32 as C programs compute it."""
    assert [mixed(number) for number in (0, 1, MASK)] == [lowbias32(number) for number in (0, 1, MASK)]
    assert mixed(0) == 0


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16
