"""Results that are views at size 1 and copies at every other: a write into one of both is seen, or isn't, by size.

`x.t().contiguous()` shares memory with `x` where `x` has one row. Tracing takes an unknown size for another than 1, and
tells nobody. Takes a captured graph; gives conditions on its sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Node

from onegraph.ir.fx_nodes import changes_memory, storage_of, value_of
from onegraph.torch_compat.shapes import RawCondition, user_line

_MAY_COPY = frozenset({"contiguous", "reshape", "reshape_as", "flatten", "ravel"})
_PLACEHOLDERS = ("placeholder", "get_attr")


def views_at_one(graph_module: torch.fx.GraphModule) -> list[RawCondition]:
    """That no size is 1 which decides whether a result is a view, where that shows: one of both is written to later,
    and the other one is read after that, by the graph or by the caller."""
    nodes = list(graph_module.graph.nodes)
    found = []
    for index, node in enumerate(nodes):
        source = node.args[0] if _name(node) in _MAY_COPY and node.args else None
        if not isinstance(source, Node) or storage_of(source) in (None, storage_of(node)):
            continue
        symbols = list(_deciding_symbols(value_of(source), value_of(node)))
        if symbols and _shows(nodes, index, storage_of(source), storage_of(node)):
            place = user_line(node.meta.get("stack_trace"))
            found += [RawCondition(sympy.Ne(symbol, 1, evaluate=False), place, None) for symbol in symbols]
    return found


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", "")) if node.op == "call_function" else ""


def _deciding_symbols(source: torch.Tensor, result: torch.Tensor) -> Iterator[sympy.Symbol]:
    """The symbols whose value 1 makes a view of a copy. A copy of the same shape was made by `contiguous`."""
    shape, strides, target = ([_expression(n) for n in each] for each in (source.shape, source.stride(), result.shape))
    symbols = sorted({symbol for expr in (*shape, *strides, *target) for symbol in expr.free_symbols}, key=str)
    others = {symbol: 2 * index + 5 for index, symbol in enumerate(symbols)}
    if not _is_view(shape, strides, target, others):
        for symbol in symbols:
            if _is_view(shape, strides, target, {**others, symbol: 1}):
                yield symbol


def _is_view(shape: list[Any], strides: list[Any], target: list[Any], sizes: Mapping[sympy.Symbol, int]) -> bool:
    size, stride, asked = ([int(expr.subs(sizes)) for expr in each] for each in (shape, strides, target))
    tensor = torch.empty_strided(size, stride, device="meta")
    result = tensor.contiguous() if size == asked else tensor.reshape(asked)
    return bool(result.untyped_storage()._cdata == tensor.untyped_storage()._cdata)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _shows(nodes: list[Node], index: int, source: int | None, result: int | None) -> bool:
    """Whether one storage is written to after a node, and the other one is read after the write."""
    written: set[int | None] = set()
    for node in nodes[index + 1 :]:
        read = {storage_of(one) for one in node.all_input_nodes}
        if (source in written and result in read) or (result in written and source in read):
            return True
        if changes_memory(node):
            written |= read & {source, result}
    return result in written and any(one.op in _PLACEHOLDERS and storage_of(one) == source for one in nodes)
