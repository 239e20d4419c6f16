"""The eager compiler: the captured graph as it is, op by op. Nothing is compiled and nothing is stored."""

from __future__ import annotations

import importlib
import operator
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onegraph.compilers.wrapper import execute
from onegraph.ir.artifact import PieceCallable
from onegraph.ir.piece import Piece

_FLOATS = "float"


@dataclass(frozen=True)
class EagerCode:
    """The Python text of a graph's forward, and what its names stand for: a module, and an attribute in it or none."""

    source: str
    names: Mapping[str, tuple[str, str]]


def compile_piece(piece: Piece) -> PieceCallable:
    """The graph module's own forward."""
    forward = piece.graph_module.forward
    return lambda inputs: forward(*inputs)


def eager_code(piece: Piece) -> EagerCode | None:
    """The piece's forward as text; None where it needs an object that has no name: a tensor, another graph."""
    graph = piece.graph_module.graph
    if any(node.op in ("get_attr", "call_module") for node in graph.nodes):
        return None
    code = graph.python_code("self")
    used = set(re.findall(r"\w+", code.src))
    names = {name: _name_of(value) for name, value in code.globals.items() if name in used}
    found = {name: place for name, place in names.items() if place is not None}
    return EagerCode(code.src, found) if len(found) == len(names) else None


def load_piece(code: EagerCode, index: int) -> PieceCallable:
    """What `compile_piece` gives, made of the text. Raises ImportError or AttributeError for a name that is gone."""
    namespace: dict[str, Any] = {name: _object_of(*place) for name, place in code.names.items()}
    execute(f"onegraph eager piece {index}", code.source, namespace)
    forward = namespace["forward"]
    return lambda inputs: forward(None, *inputs)


def _name_of(value: Any) -> tuple[str, str] | None:
    if isinstance(value, types.ModuleType):
        return value.__name__, ""
    if isinstance(value, float):  # those that have no literal
        return _FLOATS, repr(value)
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", None) or ""
    try:
        return (module, name) if _object_of(module, name) is value else None
    except (ImportError, AttributeError, ValueError, KeyError):
        return None


def _object_of(module: str, name: str) -> Any:
    if module == _FLOATS:
        return float(name)
    found = importlib.import_module(module)
    return operator.attrgetter(name)(found) if name else found
