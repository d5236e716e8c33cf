"""A budget is read to the byte from every form that people write, and refused with what came and what was wanted."""

import dataclasses
from decimal import Decimal
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

import packlight
from packlight.budget import Budget, BudgetError, format_bytes, parse_bytes

GIB = 2**30

READABLE: list[tuple[int | str, int]] = [
    (1, 1),
    (16 * GIB, 16 * GIB),
    ("1234", 1234),
    ("1234B", 1234),
    ("800MB", 800_000_000),
    ("3kB", 3000),
    ("2GB", 2_000_000_000),
    ("1TB", 10**12),
    ("7KiB", 7 * 2**10),
    ("5MiB", 5 * 2**20),
    ("12GiB", 12 * GIB),
    ("1TiB", 2**40),
    ("12gib", 12 * GIB),
    ("12GIB", 12 * GIB),
    ("  12 GiB ", 12 * GIB),
    ("+2GiB", 2 * GIB),
    ("1.5GiB", 3 * GIB // 2),
    ("0.5 KiB", 512),
    ("00012", 12),
]
UNREADABLE: list[object] = ["", " ", "GiB", "12XB", "12 G iB", "1e9", "12,5GiB", "1_000", "nan", "inf", "-inf", "--5"]
UNREADABLE += ["0x10", "five", "%", "12%%", "1.GiB", ".5GiB", "12GiB\n3GiB"]
NOT_POSITIVE: list[int | str] = [0, -1, "0", "-0", "0GiB", "-5", "-12GiB", "0.4", "0.4B", "0.0001KiB"]
WRONG_TYPES: list[object] = [True, False, None, 16e9, float("nan"), float("inf"), [1], (1,), {"GiB": 1}, b"12GiB"]
WRONG_TYPES += [Decimal(5), Fraction(5)]


@pytest.mark.parametrize(("written", "num_bytes"), READABLE)
def test_a_readable_form_means_exactly_these_bytes(written: int | str, num_bytes: int) -> None:
    assert parse_bytes(written) == num_bytes
    assert Budget.of(written) == Budget(num_bytes)


@pytest.mark.parametrize(("share", "num_bytes"), [("80%", 800), ("100%", 1000), ("12.5 %", 125), ("0.1%", 1)])
def test_a_share_is_of_the_device(share: str, num_bytes: int) -> None:
    assert Budget.of(share, total_bytes=1000).device_bytes == num_bytes


@pytest.mark.parametrize("written", UNREADABLE)
def test_what_cannot_be_read_is_refused_with_what_came_and_what_was_wanted(written: str) -> None:
    with pytest.raises(ValueError, match="cannot be read") as caught:
        Budget.of(written, total_bytes=GIB)
    assert repr(written) in str(caught.value)
    assert '"16GiB"' in str(caught.value)


@pytest.mark.parametrize("written", NOT_POSITIVE)
def test_nothing_and_less_are_refused(written: int | str) -> None:
    with pytest.raises(ValueError, match="wanted more than 0") as caught:
        Budget.of(written)
    assert repr(written) in str(caught.value)


@pytest.mark.parametrize("written", [2**63, 10**400, "1" + "0" * 400, "9000000000TiB"], ids=lambda each: str(each)[:12])
def test_more_than_64_bits_can_count_is_refused_without_a_device_too(written: int | str) -> None:
    with pytest.raises(ValueError, match="more than any device has"):
        Budget.of(written)


@pytest.mark.parametrize("share", ["0%", "-20%", "0.01%"])
def test_an_empty_share_is_refused(share: str) -> None:
    with pytest.raises(ValueError, match="wanted more than 0"):
        Budget.of(share, total_bytes=1000)


@pytest.mark.parametrize("value", WRONG_TYPES, ids=repr)
def test_another_type_is_refused_by_its_name(value: int) -> None:
    with pytest.raises(ValueError, match=type(value).__name__) as caught:
        Budget.of(value)
    assert "wanted bytes as an int or a string" in str(caught.value)


def test_a_share_without_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'50%' is a share of a device, and none is known"):
        Budget.of("50%")


@pytest.mark.parametrize("written", ["2GiB", 2 * GIB, "100.1%", Budget(2 * GIB), 2**63 - 1])
def test_more_than_the_device_has_is_refused_with_the_device_s_size(written: int | str | Budget) -> None:
    with pytest.raises(ValueError, match=r"the device has 1\.00 GiB"):
        Budget.of(written, total_bytes=GIB)


def test_all_of_the_device_is_allowed() -> None:
    assert Budget.of("1GiB", total_bytes=GIB) == Budget.of("100%", total_bytes=GIB) == Budget.of(GIB, total_bytes=GIB)


@pytest.mark.parametrize("device_bytes", [0, -1, True, "12GiB", 1.5, None])
def test_a_budget_that_is_built_by_hand_is_checked_too(device_bytes: int) -> None:
    with pytest.raises(ValueError) as caught:
        Budget(device_bytes)
    assert f"int above 0 and got {device_bytes!r}" in str(caught.value)


@pytest.mark.parametrize("host_bytes", [0, -1, "1GiB"])
def test_the_host_s_bytes_are_checked_too(host_bytes: int) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Budget(1, host_bytes=host_bytes)


def test_a_budget_is_frozen_and_read_only_once() -> None:
    budget = Budget(5, host_bytes=6, disk="/tmp")
    assert Budget.of(budget, total_bytes=5) is budget
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.device_bytes = 6  # type: ignore[misc]


def test_the_error_of_an_unfit_budget_is_a_value_error_that_knows_the_smallest() -> None:
    assert packlight.BudgetError is BudgetError and issubclass(BudgetError, ValueError)
    assert BudgetError("no", smallest_bytes=7).smallest_bytes == 7
    assert BudgetError("no").smallest_bytes is None


@given(st.integers(1, 2**63 - 1))
def test_whole_bytes_are_exact_at_any_size(num_bytes: int) -> None:
    assert parse_bytes(num_bytes) == parse_bytes(str(num_bytes)) == parse_bytes(f"{num_bytes} B") == num_bytes


@given(st.integers(1, 9 * 10**6), st.sampled_from([("KiB", 2**10), ("MB", 10**6), ("GiB", 2**30), ("TB", 10**12)]))
def test_whole_units_are_exact_at_any_size(count: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{count}{unit[0]}") == count * unit[1]


@given(st.integers(1, 2**50))
def test_what_is_written_for_a_person_reads_back_within_half_a_digit(num_bytes: int) -> None:
    written = format_bytes(num_bytes)
    unit_bytes = {"B": 0, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[written.split()[1]]
    assert abs(parse_bytes(written) - num_bytes) <= unit_bytes / 200 + 1
    if unit_bytes == 0:
        assert parse_bytes(written) == num_bytes


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans()), st.integers(1, 2**45))
def test_anything_is_either_read_within_the_device_or_a_value_error(written: int, total_bytes: int) -> None:
    try:
        budget = Budget.of(written, total_bytes=total_bytes)
    except ValueError as error:
        assert "budget" in str(error)
    else:
        assert 1 <= budget.device_bytes <= total_bytes


@pytest.mark.parametrize(
    ("num_bytes", "written"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**19, "1.50 MiB"), (5 * 2**40, "5120.00 GiB")],
)
def test_bytes_are_written_in_the_largest_unit_that_they_reach(num_bytes: int, written: str) -> None:
    assert format_bytes(num_bytes) == written
    assert format_bytes(-num_bytes) == (f"-{written}" if num_bytes else written)
