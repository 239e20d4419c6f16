"""Conditions on sizes, judged: each is proven over the declared range, or cuts it.

Takes torch's conditions on its symbols; gives ledger entries in the names of the declared dims. A condition
that can't be proven counts as one that narrows: the benefit of the doubt is what makes silent wrong results.
"""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy

from onegraph.errors import ConstraintError
from onegraph.ir.dims import DynamicDim
from onegraph.ir.ledger import ShapeEntry
from onegraph.torch_compat.shapes import RawCondition, proven_by_ranges

_ENUMERATED = 1 << 16
"""Up to so many combinations of sizes are tried one by one where interval arithmetic proves nothing."""


def judge(
    conditions: Iterable[RawCondition],
    dims: tuple[DynamicDim, ...],
    symbols: Mapping[str, str],
    stage: str,
) -> tuple[ShapeEntry, ...]:
    """One entry for each different condition that isn't a tautology. Data-dependent symbols don't count."""
    names = {dim.name: sympy.Symbol(f"dim{i}", integer=True, nonnegative=True) for i, dim in enumerate(dims)}
    ranges = {names[dim.name]: (dim.min, dim.max) for dim in dims}
    entries: dict[str, ShapeEntry] = {}
    for condition in conditions:
        free = {str(symbol) for symbol in condition.expr.free_symbols}
        if not free or not free <= symbols.keys():
            continue
        expr = condition.expr.xreplace({s: names[symbols[str(s)]] for s in condition.expr.free_symbols})
        expr = expr.doit() if hasattr(expr, "doit") else expr
        if expr == sympy.true:
            continue
        text = _readable(expr, names)
        effect = "proven" if holds_over(expr, ranges) else "narrows"
        if text not in entries or (entries[text].user is None and condition.user is not None):
            entries[text] = ShapeEntry(
                expr=text,
                stage=stage,
                effect=effect,  # type: ignore[arg-type]
                user=condition.user,
                framework=condition.framework,
                source_line=source_line(condition.user),
            )
    return tuple(entry for entry in entries.values() if not _is_declared_range(entry, dims))


def _is_declared_range(entry: ShapeEntry, dims: tuple[DynamicDim, ...]) -> bool:
    declared = {f"{dim.name} {op} {bound}" for dim in dims for op, bound in ((">=", dim.min), ("<=", dim.max))}
    return entry.effect == "proven" and entry.expr in declared


def holds_over(expr: Any, ranges: Mapping[Any, tuple[int, int]]) -> bool:
    """Whether the condition holds for all sizes in the ranges: by intervals, else by trying them all."""
    if expr == sympy.true:
        return True
    if proven_by_ranges(expr, ranges):
        return True
    used = sorted(expr.free_symbols, key=str)
    count = 1
    for symbol in used:
        count *= ranges[symbol][1] - ranges[symbol][0] + 1
    if count > _ENUMERATED:
        return False
    try:
        return all(
            bool(expr.xreplace(dict(zip(used, map(sympy.Integer, sizes), strict=True))))
            for sizes in itertools.product(*(range(ranges[s][0], ranges[s][1] + 1) for s in used))
        )
    except (TypeError, ZeroDivisionError):
        return False


def _readable(expr: Any, names: Mapping[str, sympy.Symbol]) -> str:
    """The condition as a Python expression over the dims' names."""
    by_symbol = {str(symbol): name for name, symbol in names.items()}
    return re.sub(r"\bdim\d+\b", lambda found: by_symbol.get(found[0], found[0]), _python(expr))


def _python(expr: Any) -> str:
    relations = {"Equality": "==", "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=",
                 "StrictGreaterThan": ">", "GreaterThan": ">="}  # fmt: skip
    name = type(expr).__name__
    if name in relations:
        left, right = expr.args
        if left.is_number and not right.is_number:
            flipped = expr.reversed
            left, right, name = flipped.args[0], flipped.args[1], type(flipped).__name__
        return f"{_python(left)} {relations[name]} {_python(right)}"
    binary = {"Mod": "%", "PythonMod": "%", "FloorDiv": "//", "CleanDiv": "//", "IntTrueDiv": "/"}
    if name in binary:
        left, right = (f"({_python(a)})" if a.args else _python(a) for a in expr.args[:2])
        return f"{left} {binary[name]} {right}"
    if name in ("And", "Or"):
        return f" {name.lower()} ".join(f"({_python(a)})" for a in expr.args)
    if name == "Not":
        return f"not ({_python(expr.args[0])})"
    return str(expr)


def source_line(place: str | None) -> str | None:
    """The text of a `file:line`, as far as the file can be read."""
    if place is None:
        return None
    filename, _, number = place.partition(" ")[0].rpartition(":")
    line = linecache.getline(filename, int(number)).strip() if number.isdigit() else ""
    return line or None


def judge_region(
    conditions: Iterable[RawCondition],
    dims: tuple[DynamicDim, ...],
    symbols: Mapping[str, str],
    stage: str,
    split: bool,
) -> tuple[ShapeEntry, ...]:
    """As `judge`, for a trace at sample sizes: what cuts the range makes a region, with the effect `split`.

    Without `split` a trace may tell 0 and 1 from other sizes, as torch does, and no more: ConstraintError.
    """
    given = list(conditions)
    if not split:
        from_two = tuple(replace(dim, min=max(dim.min, min(dim.max, 2))) for dim in dims)
        refuse_narrowing(judge(given, from_two, symbols, stage), dims)
    return tuple(
        replace(entry, effect="split") if entry.effect == "narrows" else entry
        for entry in judge(given, dims, symbols, stage)
    )


def region_predicate(entries: Iterable[ShapeEntry], fixed: Mapping[str, int]) -> str | None:
    """The condition of a region in the dims' names: what its trace relies on, and the sizes that are constants."""
    parts = [f"{name} == {size}" for name, size in fixed.items()]
    parts += [f"({entry.expr})" for entry in entries if entry.effect == "split"]
    return " and ".join(dict.fromkeys(parts)) or None


def refuse_narrowing(entries: Iterable[ShapeEntry], dims: tuple[DynamicDim, ...]) -> None:
    """Raises ConstraintError if an entry narrows the declared range; it holds all such entries."""
    narrowing = tuple(entry for entry in entries if entry.effect == "narrows")
    if narrowing:
        told = tuple(entry for entry in narrowing if entry.user)  # what torch derived from these adds no place
        declared = ", ".join(f"{dim.name} = {dim.min}..{dim.max}" for dim in dims)
        report = ConstraintReport(told or narrowing, dims)
        raise report.error(f"the model works only for a part of the declared range ({declared})")


_TOLD = 8
"""So many conditions stand in an error's text; `constraints` has all."""


@dataclass(frozen=True)
class ConstraintReport:
    """Conditions that a declared range doesn't imply, as one error: what, where, why it matters, and the ways out."""

    entries: tuple[ShapeEntry, ...]
    dims: tuple[DynamicDim, ...]
    either: bool = False
    """Whether the module works for both answers of the condition, each with a graph of its own."""
    can_split: bool = True
    """Whether splitting hasn't been tried yet."""

    def error(self, summary: str) -> ConstraintError:
        """The error, which begins with `summary`."""
        first = self.entries[0]
        told, more = self.entries[:_TOLD], len(self.entries) - _TOLD
        lines = [f"{summary}:", *(f"    {entry.expr}" for entry in told), *([f"    and {more} more"] * (more > 0))]
        lines.append("  One graph serves every size of the range, so it can't take one side for all of them.")
        return ConstraintError(
            "\n".join(lines),
            where="\n         ".join(dict.fromkeys(_place(entry) for entry in self.entries)),
            hint="one of these\n" + "\n".join(f"    - {way}" for way in self._ways_out(first)),
            constraints=self.entries,
        )

    def _ways_out(self, entry: ShapeEntry) -> Iterator[str]:
        yield "no branch: compute the same for every size, such as x * 2 whatever the size"
        yield "torch.where: torch.where(torch.arange(x.shape[0]) < 64, a, b) chooses inside the graph"
        yield (
            "hide it: @onegraph.opaque on a function `def pick(x: torch.Tensor) -> torch.Tensor: ...` that holds "
            "the branch; it runs as it is"
        )
        if self.can_split:
            yield 'on_constraint="split" (-O.on_constraint=split): an artifact for each answer, at most 8'
        if (narrower := self._narrower(entry)) is not None:
            yield f"a narrower Dim, where the answer is the same everywhere: {narrower}"

    def _narrower(self, entry: ShapeEntry) -> str | None:
        """The longest run of sizes with one answer, if the condition is on one dim whose sizes can be tried."""
        names = [dim for dim in self.dims if re.search(rf"\b{re.escape(dim.name)}\b", entry.expr)]
        if len(names) != 1 or names[0].max - names[0].min >= _ENUMERATED:
            return None
        dim = names[0]
        try:
            code = compile(entry.expr, "<constraint>", "eval")
            answers = [bool(eval(code, {dim.name: size})) for size in range(dim.min, dim.max + 1)]  # noqa: S307
        except Exception:  # noqa: BLE001 - an expression that isn't Python, or divides by zero
            return None
        runs = [(answer, len(list(run))) for answer, run in itertools.groupby(answers)]
        ends = list(itertools.accumulate(length for _, length in runs))
        wanted = [i for i, (answer, _) in enumerate(runs) if answer or self.either]
        if not wanted or len(runs) == 1:
            return None
        best = max(wanted, key=lambda i: runs[i][1])
        if runs[best][1] < 2:
            return None
        first = dim.min + ends[best] - runs[best][1]
        return f'Dim("{dim.name}", min={first}, max={dim.min + ends[best] - 1})'


def _place(entry: ShapeEntry) -> str:
    quoted = f": {entry.source_line}" if entry.source_line else ""
    framework = f", by {entry.framework}" if entry.framework and entry.user else ""
    return f"{entry.user or entry.framework or 'torch'}{quoted}   ({entry.stage}{framework})"


def data_dependent_constraint(
    condition: Any, user: str | None, dims: tuple[DynamicDim, ...], symbols: Mapping[str, str]
) -> ShapeEntry | None:
    """The entry for a condition on sizes that tracing had to decide and couldn't: it splits the declared range.

    `symbols` maps torch's symbols to dims. None for a condition on something else than these, such as `.item()`.
    """
    known = {dim.name: sympy.Symbol(f"dim{i}", integer=True, nonnegative=True) for i, dim in enumerate(dims)}
    if not {str(symbol) for symbol in condition.free_symbols} <= {s for s, name in symbols.items() if name in known}:
        return None
    expr = condition.xreplace({s: known[symbols[str(s)]] for s in condition.free_symbols})
    return ShapeEntry(_readable(expr, known), "capture", "narrows", user=user, source_line=source_line(user))
