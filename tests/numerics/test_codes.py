"""Codes are the nearest ones, or right on average where they are random, and packing loses nothing."""

import pytest
import torch
from torch import Tensor

from packlight.numerics import codes as coding
from packlight.numerics import noise
from packlight.numerics.books import (
    DYNAMIC_EXPONENT,
    E4M3_MAX,
    LINEAR_WITHOUT_ZERO,
    NORMAL_FLOAT,
    CodeBook,
    expanded_tables,
)

BOOKS = [NORMAL_FLOAT, DYNAMIC_EXPONENT, LINEAR_WITHOUT_ZERO]
CPU = torch.device("cpu")
#: A mean of n random codes is within this many standard deviations; beyond it lies one run in 10^9.
DEVIATIONS = 6.1


def around(points: Tensor) -> Tensor:
    return torch.cat([points, points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1e9))])


# Books


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: str(book.name))
def test_a_nearest_code_is_bucketize_at_and_around_every_border(book: CodeBook, seed: int) -> None:
    low = -book.span if book.values[0] < 0 else 0.0
    borders = torch.tensor(book.borders)
    cells = torch.linspace(low, book.span, coding.GUESS_CELLS + 1)
    points = torch.cat(
        [borders, torch.tensor(book.values) * book.span, cells, torch.rand(50_000) * 2 * book.span - low]
    )
    points = around(points).clamp(low, book.span)
    assert torch.equal(coding.nearest_codes(points, book), torch.bucketize(points, borders).byte())


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: str(book.name))
def test_no_value_of_a_book_is_nearer_than_the_nearest_codes(book: CodeBook, seed: int) -> None:
    low = -1.0 if book.values[0] < 0 else 0.0
    ratios = torch.rand(20_000, dtype=torch.float64) * (1 - low) + low
    distances = (ratios[:, None] - torch.tensor(book.values, dtype=torch.float64)).abs()
    chosen = distances.gather(1, coding.nearest_codes((ratios * book.span).float(), book).long()[:, None])[:, 0]
    # Tags move a border by up to 15 ulp, so near one the other value may be nearer by as much.
    assert float((chosen - distances.amin(1)).max()) <= 2 * 16 * 2**-24


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: str(book.name))
def test_a_value_of_a_book_gets_its_own_code(book: CodeBook) -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = coding.book_values(codes, book)
    assert torch.equal(values, torch.tensor(book.values))
    assert torch.equal(coding.nearest_codes(values * book.span, book), codes)


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: str(book.name))
def test_numbers_that_are_no_ratios_get_a_code_too(book: CodeBook) -> None:
    strange = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
    codes = coding.nearest_codes(strange, book)
    assert bool((codes < 16).all())


# Nibbles


def test_low_nibbles_are_the_first_half_of_a_block_and_high_ones_the_second() -> None:
    codes = torch.arange(128, dtype=torch.uint8) % 16
    codes[64:] = 15 - codes[64:]
    packed = coding.pack(torch.cat([codes, codes[:66]]))
    assert packed[:64].tolist() == [i % 16 + 16 * (15 - i % 16) for i in range(64)]
    assert packed[64:].tolist() == [i % 16 + (16 * (15 - i) if i < 2 else 0) for i in range(64)]


@pytest.mark.parametrize("lengths", [range(129), range(129, 301)], ids=str)
def test_unpacking_gives_what_was_packed_for_every_length(lengths: range, seed: int) -> None:
    for numel in lengths:
        codes = torch.randint(16, (numel,), dtype=torch.uint8)
        packed = coding.pack(codes)
        assert packed.numel() == numel // 128 * 64 + min(64, numel % 128)
        assert torch.equal(coding.unpack(packed, numel), codes)


# Roots


@pytest.mark.parametrize("bits", [4, 8])
def test_nearest_root_codes_are_nearest_in_the_root_and_never_below_the_first_level(bits: int) -> None:
    top = 2**bits * (1 - 2**-16)
    levels = torch.linspace(0, top, 40_001)
    stored = coding.root_codes(levels, None).float() + 1
    assert float(stored.min()) == 1
    assert float(stored.max()) == 2**bits
    inside = levels >= 1
    assert float((stored - levels)[inside].abs().max()) <= 0.5
    assert bool((stored[~inside] == 1).all())


@pytest.mark.parametrize("level", [1.0, 1.01, 1.5, 1.93, 2.0, 7.25, 14.6, 15.99, 200.3, 255.9])
def test_random_root_codes_are_right_on_average(level: float, seed: int) -> None:
    number = 200_000
    exact = float(torch.tensor(level))
    uniforms = noise.uniforms(seed, 0, number, device=torch.device("cpu"))
    stored = coding.root_codes(torch.full((number,), level), uniforms).double() + 1
    floor = exact // 1
    assert set(stored.tolist()) <= {floor, floor + 1}
    up = exact - floor
    deviation = (up * (1 - up) / number) ** 0.5
    # Besides chance: half of the numbers have 16 bits, and the sum with them rounds relatively by 2^-24. Elements
    # that share a word share bits, so count half.
    assert abs(float(stored.mean()) - exact) <= DEVIATIONS * 2**0.5 * deviation + 2**-17 + exact * 2**-24


def test_a_level_of_four_bits_that_is_a_code_is_never_moved() -> None:
    levels = torch.arange(1, 17).float()
    for uniform in (2**-17, 0.5, 1 - 2**-17):  # the smallest and largest of second halves
        assert torch.equal(coding.root_codes(levels, torch.full_like(levels, uniform)).float() + 1, levels)


# Softsign


def test_softsign_codes_are_the_nearest_in_the_companded_domain(seed: int) -> None:
    ratios = torch.cat([torch.linspace(-1, 1, 100_001), torch.rand(1000) * 1e-3])
    codes = coding.softsign_codes(ratios)
    assert codes.dtype == torch.int8
    exact = 127 * 2 * ratios.double() / (1 + ratios.double().abs())
    assert float((codes.double() - exact).abs().max()) <= 0.5 + 127 * 2**-23
    assert torch.equal(coding.softsign_codes(-ratios), -codes)


def test_softsign_values_have_their_own_codes() -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8)
    values = coding.softsign_values(codes)
    assert values[[0, 127, 254]].tolist() == [-1, 0, 1]
    assert torch.equal(coding.softsign_codes(values), codes)


def test_a_nan_has_the_softsign_code_of_zero() -> None:
    assert coding.softsign_codes(torch.tensor([float("nan")])).item() == 0


# FP8 with range expansion


@pytest.mark.parametrize("power", [16, 23, 64, 255])
@pytest.mark.parametrize("signed", [True, False])
def test_expanded_codes_are_the_nearest_in_e4m3(power: int, signed: bool, seed: int) -> None:
    ratios = torch.cat([torch.rand(1, 4000), torch.rand(1, 2000) ** 8, torch.zeros(1, 1), torch.ones(1, 1)], 1)
    ratios = ratios * torch.randn_like(ratios).sign() if signed else ratios
    codes = coding.expanded_codes(ratios, torch.tensor([power], dtype=torch.uint8), None, signed=signed)
    first = 0 if signed else 1
    numbers = torch.arange(first, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    expanded = E4M3_MAX * ratios[0].double().abs() ** (power / 16)
    distances = (expanded[:, None] - numbers).abs()
    chosen = distances.gather(1, ((codes[0] & 127).long() - first)[:, None])[:, 0]
    # Borders are fp32 numbers: in the expanded domain off by power / 16 half ulps and that of the ratio.
    assert bool((chosen - distances.amin(1) <= 2 * expanded * (power / 16 + 1) * 2**-24).all())
    assert torch.equal((codes[0] & 128) != 0, ratios[0] < 0)


@pytest.mark.parametrize("power", [16, 40, 255])
def test_random_expanded_codes_are_right_on_average_in_the_ratio(power: int, seed: int) -> None:
    number, powers = 100_000, torch.tensor([power], dtype=torch.uint8)
    values = expanded_tables(CPU)[0][power].double()
    for ratio in torch.rand(8).tolist():
        ratios = torch.full((1, number), ratio)
        codes = coding.expanded_codes(ratios, powers, torch.rand(1, number), signed=True)
        stored = coding.expanded_values(codes, powers)[0].double()
        below, exact = int(torch.searchsorted(values[:127], ratios[0, 0].double(), right=True)) - 1, float(ratios[0, 0])
        assert set(codes[0].tolist()) <= {below, below + 1}
        gap = float(values[below + 1] - values[below])
        up = (exact - float(values[below])) / gap
        deviation = gap * (up * (1 - up) / number) ** 0.5
        assert abs(float(stored.mean()) - exact) <= DEVIATIONS * deviation + 2**-22


@pytest.mark.parametrize("uniform", [None, 0.0, 1 - 2**-24])
@pytest.mark.parametrize("power", [16, 100])
def test_expanded_values_have_their_own_codes(power: int, uniform: float | None) -> None:
    powers = torch.tensor([power], dtype=torch.uint8)
    codes = torch.tensor([[*range(127), *range(129, 255)]], dtype=torch.uint8)
    values = coding.expanded_values(codes, powers)
    uniforms = None if uniform is None else torch.full(values.shape, uniform)
    assert torch.equal(coding.expanded_codes(values, powers, uniforms, signed=True), codes)


@pytest.mark.parametrize("uniforms", [None, torch.zeros(1, 2)])
def test_unsigned_expanded_codes_start_at_one(uniforms: Tensor | None) -> None:
    ratios, powers = torch.tensor([[0.0, 1e-30]]), torch.tensor([16], dtype=torch.uint8)
    assert coding.expanded_codes(ratios, powers, uniforms, signed=False).tolist() == [[1, 1]]


def test_the_power_is_the_largest_whose_range_fits(seed: int) -> None:
    ranges = torch.cat([10 ** (torch.rand(2000) * 12), torch.tensor([1.0, 0.0])])
    powers = coding.expansion_power(ranges, torch.ones_like(ranges)).int()
    fits = E4M3_MAX**2 / 2
    assert bool((ranges[powers > 16].double() ** (powers[powers > 16] / 16) <= fits * (1 + 1e-5)).all())
    assert bool((ranges[powers < 255].double() ** ((powers[powers < 255] + 1) / 16) > fits * (1 - 1e-5)).all())
    assert powers[-2:].tolist() == [255, 255]


def test_a_block_of_zeros_and_one_with_a_nan_have_powers_too() -> None:
    largest, smallest = torch.tensor([0.0, float("nan"), float("inf")]), torch.tensor([float("inf"), 1.0, 1.0])
    assert coding.expansion_power(largest, smallest).tolist() == [255, 16, 16]


# Roots of numbers


def test_square_roots_are_correctly_rounded(seed: int) -> None:
    values = torch.randint(1, 0x7F800000, (100_000,), dtype=torch.int32).view(torch.float32)
    roots = coding.square_root(values).double()
    up, down = (roots.float().nextafter(torch.tensor(end)).double() for end in (float("inf"), 0.0))
    exact = values.double()
    assert bool((((roots + up) / 2).square() >= exact).all() and (((roots + down) / 2).square() <= exact).all())


def test_roots_unbiased_in_the_root_give_a_truer_mean_update_than_roots_unbiased_in_the_square(seed: int) -> None:
    beta2, num_steps, num = 0.99, 800, 4000
    for level, bound in ((2, 0.10), (5, 0.05), (12, 0.02)):  # twice what a long run shows: 5.7, 2.7 and 1.0 %
        updates = {}
        for rule in ("root", "square"):
            stored = torch.full((num,), float(level))
            true, mean = stored.square(), torch.zeros(())
            for step in range(num_steps):
                squares = (torch.randn(num) * level).square()
                true = beta2 * true + (1 - beta2) * squares
                root = (beta2 * stored.square() + (1 - beta2) * squares).sqrt().clamp(min=1)
                below, uniforms = root.floor(), torch.rand(num)
                if rule == "root":
                    stored = coding.root_codes(root, uniforms).float() + 1
                else:
                    stored = below + ((root**2 - below**2) > uniforms * (2 * below + 1))
                if step >= num_steps // 2:
                    mean += (true.sqrt() / stored).mean() / (num_steps - num_steps // 2)
            updates[rule] = abs(float(mean) - 1)
        assert updates["root"] < updates["square"]
        assert updates["root"] < bound
