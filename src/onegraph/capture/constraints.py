"""Conditions on sizes, judged: each is proven over the declared range, or cuts it.

Takes torch's conditions on its symbols; gives ledger entries in the names of the declared dims. A condition
that can't be proven counts as one that narrows: the benefit of the doubt is what makes silent wrong results.
"""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Iterable, Mapping
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
    except TypeError:
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


def refuse_narrowing(entries: Iterable[ShapeEntry], dims: tuple[DynamicDim, ...]) -> None:
    """Raises ConstraintError if an entry narrows the declared range; it holds all such entries."""
    narrowing = tuple(entry for entry in entries if entry.effect == "narrows")
    if not narrowing:
        return
    told = tuple(entry for entry in narrowing if entry.user)  # what torch derived from these adds no place
    narrowing = told or narrowing
    declared = ", ".join(f"{dim.name} = {dim.min}..{dim.max}" for dim in dims)
    lines = []
    for entry in narrowing:
        place = entry.user or entry.framework or "torch"
        quoted = f": {entry.source_line}" if entry.source_line else ""
        lines.append(f"  {entry.expr}   ({entry.stage}, {place}{quoted})")
    raise ConstraintError(
        f"the model works only for a part of the declared range ({declared}); it needs\n" + "\n".join(lines),
        where=narrowing[0].user or narrowing[0].framework,
        hint="compute the same for every size (torch.where instead of a branch), hide the branch in a custom op, "
        "or declare a narrower Dim",
        constraints=narrowing,
    )


def data_dependent_constraint(condition: Any, user: str | None, dims: tuple[DynamicDim, ...]) -> tuple[ShapeEntry, ...]:
    """The entry for a condition that tracing had to decide and couldn't: it splits the declared range.

    Before a graph exists torch's symbols can't be told apart by argument; with one declared dim there is no
    doubt, with several the condition is told in torch's symbols.
    """
    text = str(condition)
    if len(dims) == 1 and len(condition.free_symbols) == 1:
        symbol = sympy.Symbol("dim0", integer=True, nonnegative=True)
        expr = condition.xreplace(dict.fromkeys(condition.free_symbols, symbol))
        text = _readable(expr, {dims[0].name: symbol})
    return (ShapeEntry(text, "capture", "narrows", user=user, source_line=source_line(user)),)
