"""Which sizes are recorded: those that were asked for, or a grid that is finer where padding costs more."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from onegraph.config.compilation import CUDAGraphMode
from onegraph.errors import ConfigError

LARGEST = 512
"""The largest size that is recorded where none is asked for."""

_FINE, _COARSE = 256, 16
"""By 8 up to the first, by the second from there on."""


def recorded_sizes(asked: Sequence[int], least: int, most: int) -> tuple[int, ...]:
    """Ascending sizes within `least..most`: those `asked` for, or 1, 2, 4, 8, by 8 to 256, and by 16 to LARGEST.

    Raises ConfigError for an asked size outside of the range.
    """
    if outside := [size for size in asked if not least <= size <= most]:
        raise ConfigError(
            f"cudagraph_capture_sizes has {outside[0]}, and sizes are {least}..{most}",
            where="cudagraph_capture_sizes",
            hint=f"give sizes from {least} to {most}",
        )
    if asked:
        return tuple(sorted(set(asked)))
    grid = [1, 2, 4, *range(8, _FINE + 1, 8), *range(_FINE + _COARSE, LARGEST + 1, _COARSE)]
    return tuple(size for size in grid if least <= size <= most)


@dataclass(frozen=True)
class Decision:
    """How a batch runs: recorded (`FULL` or `PIECEWISE`) at a padded size, or not (`NONE`), and the reason's code."""

    mode: CUDAGraphMode
    size: int
    reason: str


class Dispatcher:
    """Picks for a number of tokens, and facts of the batch, what is replayed. `full` and `piecewise` are sizes."""

    def __init__(self, mode: CUDAGraphMode, full: Sequence[int], piecewise: Sequence[int]) -> None:
        self._full, self._piecewise = sorted(full), sorted(piecewise)
        self._full_is_for_decode = mode in (CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE)
        self._is_off = mode is CUDAGraphMode.NONE

    def decide(self, num_tokens: int, *, is_uniform_decode: bool) -> Decision:
        """`is_uniform_decode`: each request of the batch has one new token."""
        if self._is_off:
            return Decision(CUDAGraphMode.NONE, num_tokens, "off")
        may_be_full = is_uniform_decode or not self._full_is_for_decode
        for mode, sizes, may in (
            (CUDAGraphMode.FULL, self._full, may_be_full),
            (CUDAGraphMode.PIECEWISE, self._piecewise, True),
        ):
            place = bisect.bisect_left(sizes, num_tokens)
            if may and place < len(sizes):
                padded = sizes[place]
                return Decision(mode, padded, "exact" if padded == num_tokens else "padded")
        if not may_be_full and not self._piecewise:
            return Decision(CUDAGraphMode.NONE, num_tokens, "not_uniform_decode")
        known = self._full or self._piecewise
        return Decision(CUDAGraphMode.NONE, num_tokens, "above_largest" if known else "nothing_recorded")
