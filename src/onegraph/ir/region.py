"""A Region is the unit of specialisation: the sizes for which one artifact is right."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from onegraph.errors import ConfigError
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

    def has(self, size: int) -> bool:
        """Whether a size of the first dim lies in its range."""
        return bool(self.ranges) and self.ranges[0][1] <= size <= self.ranges[0][2]

    def dims(self, declared: tuple[DynamicDim, ...]) -> tuple[DynamicDim, ...]:
        """The declared dims with this region's ranges."""
        bounds = {name: (least, most) for name, least, most in self.ranges}
        return tuple(
            replace(dim, min=bounds[dim.name][0], max=bounds[dim.name][1]) if dim.name in bounds else dim
            for dim in declared
        )

    def condition(self, whole: Region) -> str | None:
        """What tells the region's sizes from the others of `whole`, as a Python expression; None for all of them."""
        parts = []
        for one, (_, lower, upper) in zip(self.ranges, whole.ranges, strict=True):
            name, least, most = one
            if least == most and lower != upper:
                parts.append(f"{name} == {least}")
            elif (least, most) != (lower, upper):
                parts.append(f"{name} >= {least} and {name} <= {most}")
        return " and ".join(parts) or None


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


def requested_regions(
    dims: tuple[DynamicDim, ...], ranges: Sequence[tuple[int, int] | int], sizes: Sequence[int]
) -> tuple[Region, ...]:
    """A region for each of the `sizes` and `ranges` of the first dim, and the general one if these leave out any size.

    `ranges` are pairs (from, to), or numbers at which a range ends: 8, 32 stand for up to 8, from 9 to 32, from 33 on.
    A size that has a region of its own isn't served by a range around it. Without `ranges` all other sizes are the
    general region's. Raises ConfigError for sizes that aren't declared, and ranges that overlap.
    """
    general = general_region(dims)
    if not ranges and not sizes:
        return (general,)
    if not dims:
        raise ConfigError(
            "there is no size to make artifacts of their own for: the module was compiled without dynamic dims",
            where="compile_sizes" if sizes else "compile_ranges",
            hint="declare one in dynamic_shapes, or leave the option out",
        )
    first = dims[0]
    boxes = [("compile_sizes", (size, size)) for size in dict.fromkeys(sizes)]
    boxes += [("compile_ranges", box) for box in _closed_ranges(first, ranges)]
    for option, (least, most) in boxes:
        if not first.min <= least <= most <= first.max:
            told = least if least == most else f"{least}..{most}"
            raise ConfigError(
                f"{option} has {told}, and {first.name} is declared as {first.min}..{first.max}", where=option
            )
    regions = [_narrowed(general, first, box) for _, box in boxes]
    in_ranges = [box for option, box in boxes if option == "compile_ranges"]
    alone = [size for size in dict.fromkeys(sizes) if not any(least <= size <= most for least, most in in_ranges)]
    covered = len(alone) + sum(most - least + 1 for least, most in in_ranges)
    return tuple(regions) if covered == first.max - first.min + 1 else (*regions, general)


def _closed_ranges(dim: DynamicDim, ranges: Sequence[tuple[int, int] | int]) -> list[tuple[int, int]]:
    """The ranges as pairs in order; numbers at which one ends give a range after the last of them, too."""
    ends = [one for one in ranges if isinstance(one, int)]
    pairs = sorted(one for one in ranges if not isinstance(one, int))
    if ends and pairs:
        raise ConfigError(
            "compile_ranges has both numbers and pairs",
            where="compile_ranges",
            hint="give the ranges' last sizes, [8, 32], or each as a pair, [[1, 8], [9, 32]]",
        )
    if any(not dim.min <= end <= dim.max for end in ends):
        raise ConfigError(
            f"compile_ranges has {next(end for end in ends if not dim.min <= end <= dim.max)}, and {dim.name} is "
            f"declared as {dim.min}..{dim.max}",
            where="compile_ranges",
        )
    if ends:
        stops = sorted({*ends, dim.max})
        pairs = list(zip([dim.min, *(stop + 1 for stop in stops[:-1])], stops, strict=True))
    for one, other in itertools.pairwise(pairs):
        if other[0] <= one[1]:
            raise ConfigError(
                f"compile_ranges has {one[0]}..{one[1]} and {other[0]}..{other[1]}, which overlap",
                where="compile_ranges",
            )
    return pairs


def _narrowed(general: Region, dim: DynamicDim, box: tuple[int, int]) -> Region:
    least, most = box
    hint = canonical_hint(replace(dim, min=least, max=most))
    return Region(
        ranges=tuple((n, least, most) if n == dim.name else (n, lower, upper) for n, lower, upper in general.ranges),
        hints=tuple((n, hint) if n == dim.name else (n, size) for n, size in general.hints),
    )
