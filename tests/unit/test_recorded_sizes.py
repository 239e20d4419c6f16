"""The sizes that are recorded, and what is picked for a batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onegraph.config.compilation import CUDAGraphMode
from onegraph.cudagraph.sizes import LARGEST, Dispatcher, SizeChoice, recorded_sizes, sizes_for_traffic
from onegraph.errors import ConfigError
from onegraph.ir.recording import RecordedSize, RecordingPlan, Uncovered, most_padding, padding_of

FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE


def test_the_grid() -> None:
    assert recorded_sizes((), 1, 32) == (1, 2, 4, 8, 16, 24, 32)
    assert recorded_sizes((), 2, 20) == (2, 4, 8, 16)
    assert recorded_sizes((), 5, 7) == (7,) and recorded_sizes((), 600, 2000) == ()
    large = recorded_sizes((), 1, 8192)
    assert large[-1] == LARGEST and {256, 272, 288} <= set(large) and 264 not in large
    assert recorded_sizes((8, 3, 3), 1, 8) == (3, 8)
    with pytest.raises(ConfigError, match="has 9, and sizes are 1..8"):
        recorded_sizes((1, 9), 1, 8)


@pytest.mark.parametrize(
    ("mode", "full", "piecewise", "num_tokens", "decode", "expected"),
    [
        (NONE, (), (), 4, True, (NONE, 4, "off")),
        (FULL, (2, 8), (), 8, False, (FULL, 8, "exact")),
        (FULL, (2, 8), (), 3, False, (FULL, 8, "padded")),
        (FULL, (2, 8), (), 9, False, (NONE, 9, "above_largest")),
        (CUDAGraphMode.FULL_DECODE_ONLY, (2, 8), (), 3, True, (FULL, 8, "padded")),
        (CUDAGraphMode.FULL_DECODE_ONLY, (2, 8), (), 3, False, (NONE, 3, "not_uniform_decode")),
        (CUDAGraphMode.FULL_AND_PIECEWISE, (2, 8), (2, 16), 3, False, (PIECEWISE, 16, "padded")),
        (CUDAGraphMode.FULL_AND_PIECEWISE, (2, 8), (2, 16), 8, True, (FULL, 8, "exact")),
        (CUDAGraphMode.FULL_AND_PIECEWISE, (2, 8), (2, 16), 9, True, (PIECEWISE, 16, "padded")),
        (CUDAGraphMode.FULL_AND_PIECEWISE, (2, 8), (2, 16), 17, True, (NONE, 17, "above_largest")),
        (PIECEWISE, (), (4,), 1, True, (PIECEWISE, 4, "padded")),
    ],
)
def test_what_is_picked(
    mode: CUDAGraphMode,
    full: tuple[int, ...],
    piecewise: tuple[int, ...],
    num_tokens: int,
    decode: bool,
    expected: tuple[CUDAGraphMode, int, str],
) -> None:
    decision = Dispatcher(mode, full, piecewise).decide(num_tokens, is_uniform_decode=decode)
    assert (decision.mode, decision.size, decision.reason) == expected


@given(st.sets(st.integers(1, 64)), st.integers(1, 80), st.booleans())
def test_the_smallest_size_that_holds_the_batch(sizes: set[int], num_tokens: int, decode: bool) -> None:
    decision = Dispatcher(FULL, tuple(sizes), ()).decide(num_tokens, is_uniform_decode=decode)
    holding = [size for size in sizes if size >= num_tokens]
    assert decision.size == min(holding, default=num_tokens)
    assert (decision.mode is FULL) == bool(holding)


def work(traffic: Mapping[int, int], sizes: Sequence[int]) -> int:
    """Rows that are computed: padded to the next size, or twice a call's own above the largest."""
    return sum(
        count * min((size for size in sizes if size >= rows), default=2 * rows) for rows, count in traffic.items()
    )


@given(
    st.dictionaries(st.integers(1, 40), st.integers(0, 50), max_size=8),
    st.sets(st.integers(1, 44), min_size=1, max_size=7),
    st.none() | st.integers(1, 400),
)
def test_no_other_choice_of_sizes_is_better_for_the_traffic(
    traffic: dict[int, int], candidates: set[int], budget: int | None
) -> None:
    def bytes_of(size: int) -> int:
        return 3 * size + 5

    choices = [
        sizes for length in range(len(candidates) + 1) for sizes in itertools.combinations(sorted(candidates), length)
    ]
    fitting = [sizes for sizes in choices if budget is None or sum(map(bytes_of, sizes)) <= budget]
    best = min((work(traffic, sizes), sum(map(bytes_of, sizes))) for sizes in fitting)
    found = sizes_for_traffic(traffic, tuple(candidates), bytes_of, budget)
    assert (work(traffic, found), sum(map(bytes_of, found))) == best


def test_sizes_are_chosen_by_traffic_and_memory() -> None:
    traffic = {1: 900, 3: 60, 13: 40}
    assert SizeChoice(traffic=traffic).sizes(1, 64) == (1, 3, 13), "each as it is: nothing is padded"
    tight = SizeChoice(traffic=traffic, budget_bytes=14)
    assert tight.sizes(1, 64, bytes_per_row=1.0) == (1, 3), "13 rows forty times cost less unrecorded"
    assert str(tight) == "chosen by traffic and 0 MiB of memory"
    assert SizeChoice(budget_bytes=10).sizes(1, 64, bytes_per_row=1.0) == (2, 8), "each size counts alike"
    with pytest.raises(ConfigError, match="no size from 1 to 64 is worth recording"):
        SizeChoice(budget_bytes=10).sizes(1, 64, bytes_per_row=100.0)
    assert SizeChoice((1, 2, 4, 8), is_default=True).sizes(1, 4) == (1, 2, 4)
    with pytest.raises(ConfigError, match="has 8"):
        SizeChoice((1, 2, 4, 8)).sizes(1, 4)


def test_where_nothing_is_padded_the_most_frequent_sizes_are_chosen() -> None:
    choice = SizeChoice(traffic={1: 5, 3: 900, 20: 70}, pads=False)
    assert choice.sizes(1, 64) == (1, 3, 20)
    tight = SizeChoice(traffic={1: 5, 3: 900, 20: 70}, budget_bytes=4, pads=False)
    assert tight.sizes(1, 64, bytes_per_row=1.0) == (1, 3)


def test_padding_is_told() -> None:
    assert most_padding((1, 2, 4, 8)) == (0.375, 5, 8)
    assert padding_of({3: 1, 1: 1}, (1, 4)) == pytest.approx(1 / 5)
    assert padding_of({9: 1}, (8,)) == 0, "above the largest nothing is padded"


def test_a_plan_tells_before_anything_is_recorded() -> None:
    uncovered = (Uncovered(9, 64, "more tokens than the largest recorded batch"),)
    first = RecordedSize(8, FULL, 100, 8 * 2**20, 0.3, {})
    plan = RecordingPlan({FULL: (1, 2, 4, 8)}, "by default", None, first, uncovered, {5: 1})
    assert plan.lines() == [
        "FULL at 1, 2, 4, 8 (by default); at most 38% padding: 5 runs as 8, 37.5% with this traffic",
        "at most about 15.0 MiB and 1.2 s",
        "not recorded: 9..64: more tokens than the largest recorded batch",
    ]
    told = plan.to_dict()
    assert told["expected_bytes"] == 15 * 2**20 and told["expected_seconds"] == 1.2
    assert told["padding"]["FULL"] == {"most": 0.375, "at": 5, "runs_as": 8, "of_traffic": 0.375}
    lazy = RecordingPlan({FULL: (1,)}, "by default", 1)
    assert lazy.lines() == ["FULL at 1 (by default), each when it first comes"]
    lazy = RecordingPlan({FULL: (1, 2, 3, 8, 9)}, "by default", 8)
    assert lazy.lines()[0].startswith("FULL at 1..3, 8, 9 (by default), each when it comes for the 8th time; at most")
    assert lazy.to_dict()["expected_bytes"] is None
