"""The cover of declared ranges by regions: which sizes no artifact is right for yet, and what to capture next.

Takes the declared dims and the predicates of the regions so far. Gives the next sizes to capture at, until every
size is covered. Where the sizes are too many to try each, the ends, the neighbours of the predicates' numbers and
the powers of two stand for them; a call at another size that no predicate holds for is refused, never guessed.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from onegraph.errors import ConstraintError
from onegraph.ir.dims import DynamicDim
from onegraph.ir.region import canonical_hint

MAX_REGIONS = 8
"""Of sizes from 2 on; those of the sizes 0 and 1 come on top."""
_TRIED = 1 << 16


@dataclass(frozen=True)
class Sizing:
    """How sizes are traced: `mode` is a value of `dynamic_shapes`, `sizes` the example's size for each dim.

    With backed sizes the trace takes the branches of these sizes; a dim that is missing gets one by `first_size`.
    """

    mode: str
    sizes: tuple[tuple[str, int], ...] = ()

    def size(self, dim: DynamicDim, index: int) -> int:
        """The size of a dim, the `index`-th that was declared."""
        return dict(self.sizes).get(dim.name, first_size(dim, index))


UNBACKED = Sizing("unbacked")


@functools.cache
def predicate_functions() -> dict[str, Any]:
    """Functions of sympy and torch in predicates, by name."""
    from onegraph.torch_compat.shapes import size_functions  # imports sympy, which few predicates need

    return {**size_functions(), "Max": max, "Min": min, "Abs": abs}


def first_size(dim: DynamicDim, index: int) -> int:
    """The first sample of a dim: large, and another one for each dim, since torch takes equal sizes for one."""
    return max(min(dim.max, 2), dim.min, canonical_hint(dim) - index)


def predicate_code(predicate: str, dims: Sequence[DynamicDim], variables: Sequence[str | None] = ()) -> str:
    """The predicate over the dims' names as one over the variables, or over `_n0`, `_n1` … in the dims' order."""
    named = variables or [f"_n{i}" for i in range(len(dims))]
    pairs = ((dim.name, variable or "None") for dim, variable in zip(dims, named, strict=True))
    names = sorted(pairs, key=lambda pair: -len(pair[0]))
    pattern = "|".join(rf"(?<![\w.]){re.escape(name)}(?!\w)" for name, _ in names)
    return re.sub(pattern, lambda found: dict(names)[found[0]], predicate) if names else predicate


def holds(predicate: str, dims: Sequence[DynamicDim]) -> Callable[[tuple[int, ...]], bool]:
    """A function of the sizes in the dims' order."""
    parameters = ", ".join(f"_n{i}" for i in range(len(dims)))
    source = f"lambda {parameters}: bool({predicate_code(predicate, dims)})"
    check: Callable[..., bool] = eval(source, {**predicate_functions(), "bool": bool})  # noqa: S307 - our own text
    unknown = sorted({*check.__code__.co_names} - predicate_functions().keys() - {"bool"})
    if unknown:
        raise ConstraintError(
            f"the declared range can't be split by {predicate}: there is no function {unknown[0]} of sizes here",
            where=predicate,
            hint="decide with comparisons and integer arithmetic on sizes, or outside of the module",
        )

    def on(sizes: tuple[int, ...]) -> bool:
        try:
            return check(*sizes)
        except (ArithmeticError, ValueError):  # such as a root of a negative number
            return False

    return on


def next_sizes(dims: Sequence[DynamicDim], predicates: Iterable[str]) -> tuple[tuple[str, int], ...] | None:
    """Sizes that no predicate holds for, the largest first and those with a 0 or 1 last; None if all are covered.

    Memory is allocated for them: a dim isn't larger than its first sample where a smaller one tells as much.
    """
    checks = [holds(predicate, dims) for predicate in predicates]
    numbers = {int(number) for predicate in predicates for number in re.findall(r"\b\d+\b", predicate)}
    open_sizes = [sizes for sizes in _candidates(dims, numbers) if not any(check(sizes) for check in checks)]
    if not open_sizes:
        return None
    best = max(open_sizes, key=lambda sizes: (min(sizes) >= 2, len(set(sizes)) == len(sizes), sum(sizes)))
    for index, dim in enumerate(dims):
        smaller = (*best[:index], min(best[index], first_size(dim, index)), *best[index + 1 :])
        if len(set(smaller)) >= len(set(best)) and not any(check(smaller) for check in checks):
            best = smaller
    return tuple((dim.name, size) for dim, size in zip(dims, best, strict=True))


def covered_range(dims: Sequence[DynamicDim], predicate: str) -> tuple[int | None, int | None]:
    """The least and the largest size of the first dim for which the predicate can hold."""
    if not dims:
        return None, None
    check = holds(predicate, dims)
    numbers = {int(number) for number in re.findall(r"\b\d+\b", predicate)}
    firsts = [sizes[0] for sizes in _candidates(dims, numbers) if check(sizes)]
    return (min(firsts), max(firsts)) if firsts else (None, None)


def _candidates(dims: Sequence[DynamicDim], numbers: Iterable[int]) -> list[tuple[int, ...]]:
    """All sizes, or the finest choice of telling ones that isn't more than can be tried."""
    if math.prod(dim.max - dim.min + 1 for dim in dims) <= _TRIED:
        return list(itertools.product(*(range(dim.min, dim.max + 1) for dim in dims)))
    ends = {0, 1, 2}
    near = ends | {number + step for number in numbers for step in (-1, 0, 1)}
    powers = near | {2**power + step for power in range(24) for step in (-1, 0, 1)}
    for telling in (powers, near, ends):
        chosen = [sorted({dim.min, dim.max, *(n for n in telling if dim.min <= n <= dim.max)}) for dim in dims]
        if math.prod(map(len, chosen)) <= _TRIED:
            break
    return list(itertools.islice(itertools.product(*chosen), _TRIED))
