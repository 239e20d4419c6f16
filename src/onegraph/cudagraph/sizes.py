"""Which sizes are recorded: those asked for; those that fit traffic and a budget of memory best; or a grid.

The grid is finer where padding costs more.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.resolve import is_asked
from onegraph.errors import ConfigError

LARGEST = 512
"""The largest size that is recorded where none is asked for."""

_FINE, _COARSE = 256, 16
"""By 8 up to the first, by the second from there on."""

_OWN_SIZES = 64
"""So many of the most frequent sizes may be recorded as they are, without padding."""


def recorded_sizes(asked: Sequence[int], least: int, most: int) -> tuple[int, ...]:
    """Ascending sizes within `least..most`: those `asked` for, or 1, 2, 4, 8, by 8 to 256, and by 16 to LARGEST.

    Where none of these is within, it is `most`, if that is no larger than LARGEST.
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
    return tuple(size for size in grid if least <= size <= most) or ((most,) if most <= LARGEST else ())


@dataclass(frozen=True)
class SizeChoice:
    """What sizes are chosen by: those `asked` for, or calls by size (`traffic`) and what recordings may take.

    Sizes that nobody asked for (`is_default`) are left out where they are out of range. `pads` says whether a call may
    run at a larger size: if not, those of the most calls are chosen.
    """

    asked: tuple[int, ...] = ()
    traffic: Mapping[int, int] = field(default_factory=dict)
    budget_bytes: int | None = None
    is_default: bool = False
    pads: bool = True

    @classmethod
    def of(cls, settings: Mapping[str, Mapping[str, Any]], *, pads: bool = True) -> SizeChoice:
        """From effective settings, as `ResolvedConfig.to_dict` gives them."""
        values = {name: one["value"] for name, one in settings.items()}
        return cls(
            asked=tuple(values["cudagraph_capture_sizes"]),
            traffic={int(size): count for size, count in values["cudagraph_traffic"].items()},
            budget_bytes=values["cudagraph_memory_mib"] * 2**20 or None,
            is_default=not is_asked(settings["cudagraph_capture_sizes"]["why"]),
            pads=pads,
        )

    @property
    def needs_estimate(self) -> bool:
        """Whether `sizes` wants to be told what a recording takes."""
        return self.budget_bytes is not None

    def sizes(self, least: int, most: int, bytes_per_row: float = 0.0) -> tuple[int, ...]:
        """Ascending, within `least..most`. Raises ConfigError for an asked size outside, and a budget too small."""
        asked = [size for size in self.asked if least <= size <= most] if self.is_default else self.asked
        grid = recorded_sizes(asked, least, most)
        if self.asked or not (self.traffic or self.budget_bytes):
            return grid
        traffic = dict(self.traffic) or dict.fromkeys(range(least, min(most, LARGEST) + 1), 1)
        frequent = sorted((size for size in traffic if least <= size <= most), key=lambda size: -traffic[size])
        if self.pads:
            candidates = (*grid, *frequent[:_OWN_SIZES]) if self.traffic else grid
            found = sizes_for_traffic(traffic, candidates, lambda size: size * bytes_per_row, self.budget_bytes)
        else:
            found = self._most_frequent(frequent if self.traffic else grid, bytes_per_row)
        if not found:
            budget = "" if self.budget_bytes is None else f" within {self.budget_bytes / 2**20:.0f} MiB"
            raise ConfigError(
                f"no size from {least} to {most} is worth recording{budget}: a row of a recording takes about "
                f"{bytes_per_row / 2**20:.2f} MiB",
                where="cudagraph_memory_mib" if budget else "cudagraph_traffic",
                hint="allow more memory, or give sizes that there are calls of",
            )
        return found

    def _most_frequent(self, candidates: Sequence[int], bytes_per_row: float) -> tuple[int, ...]:
        """As many of the candidates, the first ones first, as the budget has room for."""
        left, found = self.budget_bytes, []
        for size in candidates[:_OWN_SIZES]:
            if left is None or size * bytes_per_row <= left:
                found.append(size)
                left = None if left is None else int(left - size * bytes_per_row)
        return tuple(sorted(found))

    def __str__(self) -> str:
        if self.asked:
            return "by default" if self.is_default else "as asked for"
        by = ["traffic"] if self.traffic else []
        by += [f"{self.budget_bytes / 2**20:.0f} MiB of memory"] if self.budget_bytes is not None else []
        return f"chosen by {' and '.join(by)}" if by else "finer where padding costs more"


def sizes_for_traffic(
    traffic: Mapping[int, int], candidates: Sequence[int], bytes_of: Callable[[int], float], budget: float | None
) -> tuple[int, ...]:
    """The candidates whose recordings fit into `budget` bytes (None: any) and cost this traffic the least work.

    `traffic` has how many calls there were of each size. A call runs at the next larger size, which costs the rows of
    padding; one above the largest runs without a recording, which is counted as if it ran at twice its size, since
    small calls are several times slower then. Of equal choices the one with the fewest bytes is taken, so a size that
    no call needs isn't recorded. Exact: all choices that nothing else beats in both bytes and work are kept on the
    way, from the smallest size to the largest.
    """
    called = sorted(size for size, count in traffic.items() if count)
    calls_upto = [0, *itertools.accumulate(traffic[size] for size in called)]
    rows_upto = [0, *itertools.accumulate(traffic[size] * size for size in called)]
    grid = sorted(set(candidates))
    needed = sorted({grid[i] for size in called if (i := bisect.bisect_left(grid, size)) < len(grid)})
    cost = {size: bytes_of(size) for size in needed}

    def work(after: int, upto: int) -> int:
        return upto * (calls_upto[bisect.bisect(called, upto)] - calls_upto[bisect.bisect(called, after)])

    def unrecorded(after: int) -> int:
        return 2 * (rows_upto[-1] - rows_upto[bisect.bisect(called, after)])

    best: dict[int, list[tuple[float, int, tuple[int, ...]]]] = {
        0: [(0.0, 0, ())]
    }  # by the largest: bytes, work, sizes
    for size in needed:
        longer = [
            (num_bytes + cost[size], done + work(largest, size), (*sizes, size))
            for largest, choices in best.items()
            for num_bytes, done, sizes in choices
            if budget is None or num_bytes + cost[size] <= budget
        ]
        best[size] = _undominated(longer)
    ended = [
        (done + unrecorded(largest), num_bytes, sizes)
        for largest, choices in best.items()
        for num_bytes, done, sizes in choices
    ]
    return min(ended)[2]


def _undominated(choices: list[tuple[float, int, tuple[int, ...]]]) -> list[tuple[float, int, tuple[int, ...]]]:
    """Those with less work than all that take no more bytes."""
    kept: list[tuple[float, int, tuple[int, ...]]] = []
    for choice in sorted(choices):
        if not kept or choice[1] < kept[-1][1]:
            kept.append(choice)
    return kept


@dataclass(frozen=True)
class Decision:
    """How a batch runs: recorded (`FULL` or `PIECEWISE`) at a padded size, or not (`NONE`), and the reason's code."""

    mode: CUDAGraphMode
    size: int
    reason: str


class Dispatcher:
    """Picks for a number of tokens, and facts of the batch, what is replayed. `full` and `piecewise` are sizes.

    With mode NONE nothing is, for the reason `why_off`.
    """

    def __init__(
        self, mode: CUDAGraphMode, full: Sequence[int], piecewise: Sequence[int], why_off: str = "off"
    ) -> None:
        self._full, self._piecewise = sorted(full), sorted(piecewise)
        self._full_is_for_decode = mode in (CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE)
        self._why_off = why_off if mode is CUDAGraphMode.NONE else None

    def decide(self, num_tokens: int, *, is_uniform_decode: bool) -> Decision:
        """`is_uniform_decode`: each request of the batch has one new token."""
        if self._why_off is not None:
            return Decision(CUDAGraphMode.NONE, num_tokens, self._why_off)
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
