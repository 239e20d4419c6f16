"""A Region is the unit of specialisation: the sizes for which one artifact is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onegraph.ir.dims import DynamicDim


@dataclass(frozen=True)
class Region:
    """A box of sizes, one closed range per dim, with the hint that the compiler is given for each dim.

    `ranges` is `((name, min, max), ...)`; `predicate` is an optional condition on the sizes, as a Python
    expression over the dims' names; `hints` are the sizes for which code is tuned, never the first call's.
    """

    ranges: tuple[tuple[str, int, int], ...]
    hints: tuple[tuple[str, int], ...] = ()
    predicate: str | None = None

    def contains(self, sizes: Mapping[str, int]) -> bool:
        """Whether the sizes, by dim name, lie in the region. A dim that is missing counts as outside."""
        if any(not lower <= sizes.get(name, lower - 1) <= upper for name, lower, upper in self.ranges):
            return False
        if self.predicate is None:
            return True
        return bool(eval(self.predicate, {"__builtins__": {}}, dict(sizes)))  # noqa: S307 - our own text

    def to_dict(self) -> dict[str, object]:
        return {
            "ranges": [{"name": name, "min": lower, "max": upper} for name, lower, upper in self.ranges],
            "hints": dict(self.hints),
            "predicate": self.predicate,
        }


def canonical_hint(dim: DynamicDim) -> int:
    """The size for which code of the general region is tuned: it depends on the declared range alone.

    Inductor's own fallback for an unknown size is 8192; a dim that cannot be that large takes its maximum.
    """
    return max(dim.min, min(dim.max, 8192))


def general_region(dims: tuple[DynamicDim, ...]) -> Region:
    """The region of everything that was declared."""
    return Region(
        ranges=tuple((dim.name, dim.min, dim.max) for dim in dims),
        hints=tuple((dim.name, canonical_hint(dim)) for dim in dims),
    )
