"""Padding: rows that nobody asked for, with which a call runs at a recorded size; what stands in them, for people."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onegraph.config.compilation import CUDAGraphMode

Policy = str | int
"""What stands in an input's padding: one of `config.compilation.PADDING`, or a number."""

_LISTED = 6
"""So many ranges of sizes are listed in the text; in the data there are all."""


@dataclass(frozen=True)
class StepInput:
    """An input that each call fills anew; `shape` has numbers, and the names of dims. `padding` None: it has none."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    padding: Policy | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "padding": self.padding}


@dataclass(frozen=True)
class PaddedSizes:
    """Sizes `first..last` of the first declared dim, which run as `size`, recorded as `mode`."""

    first: int
    last: int
    size: int
    mode: CUDAGraphMode

    @property
    def share(self) -> float:
        """The part of the rows that is padding, if each of the sizes comes as often."""
        return (self.size - (self.first + self.last) / 2) / self.size

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}..{self.last}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "range": [self.first, self.last],
            "size": self.size,
            "mode": self.mode.name,
            "share": round(self.share, 4),
        }


def padded_sizes(sizes: Iterable[int], least: int | None, mode: CUDAGraphMode) -> Iterator[PaddedSizes]:
    """What lies between recorded sizes, from `least` on, or else from the smallest of them."""
    edges = [*([] if least is None else [least - 1]), *sorted(sizes)]
    for before, after in itertools.pairwise(edges):
        if after - before > 1:
            yield PaddedSizes(before + 1, after - 1, after, mode)


def padding_lines(padded: Sequence[PaddedSizes], inputs: Iterable[StepInput]) -> list[str]:
    """A line that says what is padded to which size, with the part that is padding, and what stands there."""
    several = len({one.mode for one in padded}) > 1
    told = [
        f"{one} as {one.size} ({f'{one.mode.name}, ' if several else ''}{one.share:.0%})" for one in padded[:_LISTED]
    ]
    more = [f"{len(padded) - _LISTED} more"] if len(padded) > _LISTED else []
    policies = [f"{one.name} {one.padding}" for one in inputs if one.padding is not None]
    return [f"{', '.join([*told, *more])}; with {', '.join(policies)}"] if padded else []
