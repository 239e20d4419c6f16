"""Which sizes get artifacts of their own, and how the region of a size is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onegraph.errors import ConfigError
from onegraph.ir.dims import DynamicDim
from onegraph.ir.region import Region, general_region, requested_regions
from onegraph.plan.function import region_finder

ROWS, OTHERS = DynamicDim("rows", 1, 40), DynamicDim("others", 0, 9)


def bounds(regions: tuple[Region, ...]) -> list[tuple[int, int]]:
    return [region.ranges[0][1:] for region in regions]


def test_nothing_asked_for_is_one_region_of_all() -> None:
    assert requested_regions((ROWS, OTHERS), (), ()) == (general_region((ROWS, OTHERS)),)
    assert requested_regions((), (), ()) == (general_region(()),)


def test_other_dims_keep_their_range_and_hints_are_those_of_the_region() -> None:
    one, general = requested_regions((ROWS, OTHERS), (), (7,))
    assert one.ranges == (("rows", 7, 7), ("others", 0, 9)) and dict(one.hints) == {"rows": 7, "others": 9}
    assert one.condition(general) == "rows == 7" and general.condition(general) is None
    assert one.dims((ROWS, OTHERS))[0] == DynamicDim("rows", 7, 7) and one.has(7) and not one.has(8)


def test_numbers_are_the_ends_of_ranges() -> None:
    assert bounds(requested_regions((ROWS,), (8, 32), ())) == [(1, 8), (9, 32), (33, 40)]
    assert bounds(requested_regions((ROWS,), (32, 8, 40), (16,))) == [(16, 16), (1, 8), (9, 32), (33, 40)]


def test_the_general_region_is_made_only_for_what_is_left() -> None:
    assert bounds(requested_regions((ROWS,), ((1, 8), (10, 40)), (9,))) == [(9, 9), (1, 8), (10, 40)]
    assert bounds(requested_regions((ROWS,), ((1, 8),), (9, 9))) == [(9, 9), (1, 8), (1, 40)]
    assert bounds(requested_regions((DynamicDim("rows", 1, 2),), (), (1, 2))) == [(1, 1), (2, 2), (1, 2)][:2]


@pytest.mark.parametrize(
    ("ranges", "sizes"),
    [((41,), ()), ((0,), ()), (((0, 3),), ()), ((), (41,)), (((1, 8), (8, 9)), ()), ((8, (9, 12)), ())],
)
def test_what_no_size_can_have_is_an_error(ranges: tuple[object, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="compile_(ranges|sizes) has"):
        requested_regions((ROWS,), ranges, sizes)  # type: ignore[arg-type]


@given(
    st.lists(st.integers(1, 39), unique=True, max_size=4),
    st.lists(st.integers(1, 40), unique=True, max_size=4),
)
def test_the_region_found_is_the_first_that_has_the_size(ends: list[int], sizes: list[int]) -> None:
    regions = requested_regions((ROWS,), tuple(ends), tuple(sizes))
    find = region_finder(bounds(regions))
    for size in range(1, 41):
        assert find(size) == next(i for i, region in enumerate(regions) if region.has(size))
    for size in (0, 41):
        with pytest.raises(AssertionError, match="no artifact is for the size"):
            find(size)
