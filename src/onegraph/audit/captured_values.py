"""The values that a trace read, each changed in place: attributes, globals, closures, defaults.

Takes the reads of a trace. Gives Perturbations for those that are plain values at a place that can be assigned, one for
all layers that have the same value at the same place, and counts the others.
"""

from __future__ import annotations

import ast
import contextlib
import operator
import re
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.audit.perturbation import Perturbation
from onegraph.audit.settings import replaced
from onegraph.capture.state_check import evaluate
from onegraph.ir.ledger import StateRead


@dataclass(frozen=True)
class CapturedValues:
    """`num_read` places were read; `num_alike` are those that stand for another layer's."""

    perturbations: tuple[Perturbation, ...]
    num_read: int
    num_alike: int


def captured_values(reads: Iterable[StateRead]) -> CapturedValues:
    """Reads nothing but the places themselves."""
    known: set[tuple[str, str]] = set()
    expressions: set[str] = set()
    found, alike = [], 0
    for read in reads:
        if read.expression in expressions:
            continue
        expressions.add(read.expression)
        place = _place(read)
        if place is None:
            continue
        was, put = place
        value = other_value(was)
        if value is None or not _takes(read, was, value, put):
            continue
        kind = re.sub(r"\.\d+\.", ".*.", read.entry.what), repr(was)
        if kind in known:
            alike += 1
            continue
        known.add(kind)
        found.append(Perturbation(f"value.{read.entry.what}", _short(was), _short(value), replaced(was, value, put)))
    return CapturedValues(tuple(found), len(expressions), alike)


def _place(read: StateRead) -> tuple[Any, Callable[[Any], None]] | None:
    """What stands there, and what puts another value there; None for what isn't a place."""
    node = ast.parse(read.expression.strip(), mode="eval").body
    if not isinstance(node, ast.Attribute | ast.Subscript):
        return None
    try:
        holder = evaluate(ast.unparse(node.value), read.names)
        was = evaluate(read.expression, read.names)
        if isinstance(node, ast.Subscript):
            key = evaluate(ast.unparse(node.slice), read.names)
            return (was, lambda value: operator.setitem(holder, key, value)) if hasattr(holder, "__setitem__") else None
    except Exception:  # noqa: BLE001 - the user's object, which needn't let itself be read twice
        return None
    if isinstance(holder, types.ModuleType) and holder.__name__.partition(".")[0] == "torch":
        return None  # the compiler itself reads what stands there
    return was, lambda value: setattr(holder, node.attr, value)


def _takes(read: StateRead, was: Any, value: Any, put: Callable[[Any], None]) -> bool:
    """Whether the read finds what is put there: it may read a copy, such as a list of keys."""
    try:
        put(value)
        return evaluate(read.expression, read.names) is value
    except Exception:  # noqa: BLE001 - a place that takes no values, or none of these
        return False
    finally:
        with contextlib.suppress(Exception):
            put(was)


def other_value(value: Any) -> Any:
    """Another value of the same type; None for a type whose values can't be drawn."""
    if isinstance(value, bool):
        return not value
    if type(value) is int:
        return value + 1
    if type(value) is float:
        return value * 2 if value else 1.0
    if type(value) is str:
        return f"{value}_"
    if isinstance(value, torch.dtype):
        return torch.float64 if value is not torch.float64 else torch.float32
    if type(value) is tuple:
        others = map(other_value, value)
        changed = next(((index, other) for index, other in enumerate(others) if other is not None), None)
        return None if changed is None else (*value[: changed[0]], changed[1], *value[changed[0] + 1 :])
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
