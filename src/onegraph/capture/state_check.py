"""The check of captured Python state: one generated function that compares every read with what was traced.

Takes StateReads. The expressions of the reads share their prefixes (`self.layers`), so the generated function
reads each prefix once; it stops at the first read that differs.
"""

from __future__ import annotations

import ast
import functools
import math
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onegraph.capture.expression_text import chain, last_step
from onegraph.ir.ledger import StateEntry, StateRead

LITERALS = (type(None), bool, int, float, complex, str, bytes)


def differs(value: Any, expected: Any) -> bool:
    """Whether a constant would be traced differently: another type, value, sign of zero; a NaN is like itself."""
    if type(value) is not type(expected):
        return True
    if isinstance(value, float):
        if math.isnan(value) or math.isnan(expected):
            return not (math.isnan(value) and math.isnan(expected))
        return value != expected or math.copysign(1.0, value) != math.copysign(1.0, expected)
    if isinstance(value, complex):
        return differs(value.real, expected.real) or differs(value.imag, expected.imag)
    if isinstance(value, tuple | list):
        return len(value) != len(expected) or any(map(differs, value, expected))
    if isinstance(value, dict):
        return value.keys() != expected.keys() or any(differs(value[key], item) for key, item in expected.items())
    if isinstance(value, range):  # equal ones may end elsewhere
        return (value.start, value.stop, value.step) != (expected.start, expected.stop, expected.step)
    if value is expected:
        return False
    return bool(value != expected)


def evaluate(expression: str, names: Mapping[str, Any]) -> Any:
    """The value of a read's expression now. Raises whatever reading it raises.

    Chains of attributes and keys, which most are, are followed: compiling one takes a hundred times as long.
    """
    if expression in names:
        return names[expression]
    parts = chain(expression)
    if parts is not None and parts[0] in names:
        value = names[parts[0]]
        for is_attribute, key in parts[1]:
            value = getattr(value, str(key)) if is_attribute else value[key]
        return value
    return eval(_compiled(expression), {**names})  # noqa: S307 - Dynamo's expression over our own names


@functools.lru_cache(maxsize=64)
def _compiled(expression: str) -> types.CodeType:
    """A fact is evaluated a few times in a row."""
    return compile(expression.strip(), "<expression>", "eval")


@dataclass
class _Code:
    """The check function under construction; `uses` counts the places at which each expression stands."""

    parts: Mapping[str, tuple[str, str] | None]
    uses: Counter[str]
    lines: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    def value(self, text: str, keep: bool = False) -> str:
        """Source of the expression's value; what is used again is read into a variable once."""
        if text in self.variables:
            return self.variables[text]
        parts = self.parts[text]
        if parts is None:
            return text
        source = f"{self.value(parts[0])}{parts[1]}"
        if keep or self.uses[text] > 1:
            variable = self.variables[text] = f"v{len(self.variables)}"
            self.lines.append(f"        {variable} = {source}")
            return variable
        return source


def state_check(reads: tuple[StateRead, ...], also: Callable[[], bool] | None = None) -> Callable[[], bool]:
    """A function without arguments: whether every read finds what the trace found, and `also()`. It never raises."""
    parts = _parts_of_all(read.expression for read in reads)
    uses = Counter(read.expression for read in reads)
    uses.update(one[0] for one in parts.values() if one is not None)
    code = _Code(parts, uses)
    names: dict[str, Any] = {"_also": also}
    for read in reads:
        names.update(read.names)
        value = code.value(read.expression, keep=read.condition.count("{x}") > 1)
        code.lines.append(f"        if {read.condition.replace('{x}', value)}: return False")
    source = "\n".join(
        [
            "def holds():",
            "    try:",
            *code.lines,
            f"        return {'True' if also is None else '_also()'}",
            "    except Exception:",
            "        return False",
        ]
    )
    exec(compile(source, "<onegraph state check>", "exec"), names)  # noqa: S102 - our own text
    holds: Callable[[], bool] = names["holds"]
    return holds


def _parts_of_all(expressions: Iterable[str]) -> dict[str, tuple[str, str] | None]:
    """Each expression and each of its prefixes as a prefix and a last step; None for one that has none."""
    parts: dict[str, tuple[str, str] | None] = {}
    left = list(expressions)
    while left:
        text = left.pop()
        if text not in parts:
            parts[text] = last_step(text) or _parsed_step(text)
            left += (parts[text] or ())[:1]
    return parts


def _parsed_step(text: str) -> tuple[str, str] | None:
    node = ast.parse(text, mode="eval").body
    if isinstance(node, ast.Attribute):
        return ast.unparse(node.value), f".{node.attr}"
    return (ast.unparse(node.value), f"[{ast.unparse(node.slice)}]") if isinstance(node, ast.Subscript) else None


def changed_entries(reads: tuple[StateRead, ...]) -> tuple[tuple[StateEntry, str], ...]:
    """The reads that no longer find what the trace found, each with what is there now, in words."""
    changed = []
    for read in reads:
        if not state_check((read,))():
            try:
                shown = read.describe(evaluate(read.expression, read.names))
            except Exception as error:  # noqa: BLE001 - the user's attribute is gone, or raises
                shown = f"gone ({type(error).__name__}: {error})"
            changed.append((read.entry, shown))
    return tuple(changed)
