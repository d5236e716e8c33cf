"""The allocator of ranges: nothing overlaps, nothing is lost."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packlight.activations.extents import Extent, Extents, round_up

ALIGNMENT = 8
CAPACITY_BYTES = 40 * ALIGNMENT
# A number above zero asks for that many bytes; one below gives the range back that stands there in the list.
STEPS = st.lists(st.integers(1, 6 * ALIGNMENT) | st.integers(-50, -1), max_size=60)


def run(extents: Extents, steps: list[int]) -> list[Extent]:
    held: list[Extent] = []
    for step in steps:
        if step > 0:
            extent = extents.allocate(step)
            if extent is not None:
                held.append(extent)
        elif held:
            extents.release(held.pop(step % len(held)))
        check(extents, held)
    return held


def check(extents: Extents, held: list[Extent]) -> None:
    ordered = sorted(held)
    assert all(before.stop <= after.start for before, after in pairwise(ordered)), "overlap"
    assert all(0 <= extent.start and extent.stop <= CAPACITY_BYTES for extent in held)
    assert all(extent.start % ALIGNMENT == extent.num_bytes % ALIGNMENT == 0 for extent in held)
    assert extents.used_bytes == sum(extent.num_bytes for extent in held)


@given(STEPS)
def test_ranges_do_not_overlap_and_all_space_comes_back(steps: list[int]) -> None:
    extents = Extents(CAPACITY_BYTES, alignment=ALIGNMENT)
    for extent in run(extents, steps):
        extents.release(extent)
    assert extents.used_bytes == 0
    assert extents.allocate(CAPACITY_BYTES) == Extent(0, CAPACITY_BYTES), "free ranges were not joined"


@given(STEPS, st.integers(1, CAPACITY_BYTES))
def test_a_request_is_refused_only_where_no_gap_is_long_enough(steps: list[int], wanted_bytes: int) -> None:
    extents = Extents(CAPACITY_BYTES, alignment=ALIGNMENT)
    held = sorted(run(extents, steps))
    starts = [0, *(extent.stop for extent in held)]
    stops = [*(extent.start for extent in held), CAPACITY_BYTES]
    gaps = [(start, stop - start) for start, stop in zip(starts, stops, strict=True)]
    assert extents.largest_free_bytes == max(length for _, length in gaps)
    fitting = [start for start, length in gaps if length >= round_up(wanted_bytes, ALIGNMENT)]
    extent = extents.allocate(wanted_bytes)
    assert (None if extent is None else extent.start) == min(fitting, default=None)


def test_low_addresses_are_used_again_before_the_end_moves() -> None:
    extents = Extents(alignment=4096)
    held = [extents.allocate(5000) for _ in range(4)]
    assert extents.end == 4 * 8192
    assert held[1] is not None
    extents.release(held[1])
    assert extents.allocate(8192) == held[1]
    assert extents.end == 4 * 8192


def test_a_range_given_back_twice_is_noticed() -> None:
    extents = Extents(CAPACITY_BYTES, alignment=ALIGNMENT)
    first, second = extents.allocate(8), extents.allocate(8)
    assert first is not None and second is not None
    extents.release(first)
    with pytest.raises(AssertionError, match="free already"):
        extents.release(first)
    extents.release(second)
    with pytest.raises(AssertionError, match="free already"):
        extents.release(second)
