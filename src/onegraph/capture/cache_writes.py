"""Writes of rows into a view of an input, such as one layer of a KV cache: kept without a copy of what is written.

Takes a captured graph and changes it: `cache[1].index_copy_(…)`, `cache[1][slots] = rows` and `index_put_` become
ops that declare their mutation. A write into an input itself is left alone: compilers do it in place already.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

import onegraph.ops.indexed_write  # noqa: F401 - registers the ops

_VIEWS = frozenset(
    {"view", "select", "narrow", "transpose", "permute", "unsqueeze", "squeeze", "t", "unflatten", "swapaxes", "detach"}
)


def declare_cache_writes(graph_module: torch.fx.GraphModule) -> int:
    """Rewrites the graph in place; gives the number of writes that were rewritten."""
    graph = graph_module.graph
    rewritten = 0
    for node in list(graph.nodes):
        call = _as_op(node)
        if call is None:
            continue
        op, arguments = call
        with graph.inserting_before(node):
            write = graph.call_function(op, arguments)
        write.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
        write.meta["example_value"] = None
        node.replace_all_uses_with(arguments[0])
        graph.erase_node(node)
        rewritten += 1
    if rewritten:
        graph_module.recompile()
    return rewritten


def _as_op(node: torch.fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The op and its arguments for a write into a view of an input; None for every other node."""
    if node.kwargs or not node.args or not _is_view_of_input(node.args[0]):
        return None
    ops = torch.ops.onegraph
    if node.op == "call_method" and node.target == "index_copy_" and len(node.args) == 4:
        target, dim, index, source = node.args
        return (ops.index_copy.default, (target, dim, index, source)) if _is_tensor(source) else None
    if node.op == "call_method" and node.target == "index_put_" and len(node.args) in (3, 4):
        indices = node.args[1]
        if isinstance(indices, tuple | list) and len(indices) == 1 and _writes_rows(node, indices[0], node.args[2]):
            return ops.index_put.default, (node.args[0], indices[0], node.args[2], bool((*node.args, False)[3]))
    if (
        node.op == "call_function"
        and node.target is operator.setitem
        and _writes_rows(node, node.args[1], node.args[2])
    ):
        return ops.index_put.default, (node.args[0], node.args[1], node.args[2], False)
    return None


def _writes_rows(node: torch.fx.Node, index: Any, values: Any) -> bool:
    """One tensor of indices, and values of the target's dtype: assignment would cast others."""
    if not (_is_tensor(index) and _is_tensor(values)):
        return False
    target: Any = node.args[0]
    return bool(values.meta["example_value"].dtype == target.meta["example_value"].dtype)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.fx.Node) and isinstance(value.meta.get("example_value"), torch.Tensor)


def _is_view_of_input(value: Any) -> bool:
    """Whether the node is a view, by view methods and whole-number or slice indices, of a placeholder."""
    depth = 0
    while isinstance(value, torch.fx.Node) and value.op != "placeholder":
        is_method = value.op == "call_method" and value.target in _VIEWS
        is_item = value.op == "call_function" and value.target is operator.getitem and _is_basic(value.args[1])
        if not (is_method or is_item):
            return False
        value, depth = value.args[0], depth + 1
    return depth > 0 and _is_tensor(value)


def _is_basic(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(isinstance(i, int | slice) or i is None or i is Ellipsis for i in items)
