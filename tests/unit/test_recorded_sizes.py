"""The sizes that are recorded, and what is picked for a batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onegraph.config.compilation import CUDAGraphMode
from onegraph.cudagraph.sizes import LARGEST, Dispatcher, recorded_sizes
from onegraph.errors import ConfigError

FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE


def test_the_grid() -> None:
    assert recorded_sizes((), 1, 32) == (1, 2, 4, 8, 16, 24, 32)
    assert recorded_sizes((), 2, 20) == (2, 4, 8, 16)
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
