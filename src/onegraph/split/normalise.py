"""What is changed in a captured graph before it is cut, so that only tensors and whole-number sizes cross a border.

Takes a graph with its fake values, and changes it without changing what it computes: tuples are taken apart, equal
sizes become one value, and allocations move to where they are used.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from onegraph.ir.fx_nodes import changes_layout, value_of
from onegraph.torch_compat import shapes

_ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "zeros", "zeros_like", "new_zeros",
                          "ones", "ones_like", "new_ones", "full", "full_like", "new_full"})  # fmt: skip


def normalise(graph_module: torch.fx.GraphModule) -> None:
    """Does all of it, in place."""
    graph = graph_module.graph
    _take_sizes_apart(graph)
    _take_tuples_apart(graph)
    _unify_sizes(graph)
    _sink_allocations(graph)
    graph_module.recompile()


def _take_sizes_apart(graph: Graph) -> None:
    """`x.size()` as a tuple becomes one size for each dim, wherever it stands in the arguments of others."""
    for node in list(graph.nodes):
        if node.op == "placeholder" or not isinstance(value_of(node), torch.Size):
            continue
        of = node.args[0] if node.args else None
        if not (isinstance(of, Node) and isinstance(value_of(of), torch.Tensor) and len(node.args) == 1):
            continue
        with graph.inserting_after(node):
            sizes = [_size(graph, of, dim, size) for dim, size in enumerate(value_of(node))]
        _replace_in_users(node, tuple(sizes))


def _size(graph: Graph, of: Node, dim: int, size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    node = graph.call_function(torch.ops.aten.sym_size.int, (of, dim))
    node.meta = {"example_value": size, "stack_trace": of.meta.get("stack_trace")}
    return node


def _take_tuples_apart(graph: Graph) -> None:
    """A call that gives several values is followed by the items of it that anybody uses, and only they are used."""
    for node in list(graph.nodes):
        value = value_of(node)
        if node.op not in ("call_function", "call_method") or not isinstance(value, tuple | list):
            continue
        items: dict[int, Node] = {}
        for user in list(node.users):
            if user.target is operator.getitem and isinstance(user.args[1], int):
                index = user.args[1] % len(value)
                first = items.setdefault(index, user)
                if first is not user:
                    user.replace_all_uses_with(first)
                    graph.erase_node(user)
        if any(user not in items.values() for user in node.users):
            with graph.inserting_after(node):
                for index, one in enumerate(value):
                    if index not in items:
                        items[index] = graph.call_function(operator.getitem, (node, index))
                        items[index].meta = {**node.meta, "example_value": one}
            kind = tuple if isinstance(value, torch.Size) else type(value)
            _replace_in_users(node, kind(items[index] for index in range(len(value))), set(items.values()))
        for index in sorted(items, reverse=True):
            node.append(items[index])


def _replace_in_users(node: Node, values: Any, kept: set[Node] | frozenset[Node] = frozenset()) -> None:
    """Puts `values` in the place of a node that gives a tuple, in the arguments of all users but the kept ones."""
    for user in list(node.users):
        if user in kept:
            continue
        if user.target is operator.getitem and isinstance(user.args[1], int | slice):
            picked = values[user.args[1]]
            if isinstance(picked, Node):
                user.replace_all_uses_with(picked)
            else:
                _replace_in_users(user, picked) if isinstance(picked, tuple) else _replace_by_constant(user, picked)
            if not user.users:
                user.graph.erase_node(user)
            continue
        put: Callable[[Node], Any] = lambda other: values if other is node else other  # noqa: E731
        user.args, user.kwargs = map_arg(user.args, put), map_arg(user.kwargs, put)
    if not node.users:
        node.graph.erase_node(node)


def _replace_by_constant(node: Node, constant: Any) -> None:
    for user in list(node.users):
        put: Callable[[Node], Any] = lambda other: constant if other is node else other  # noqa: E731
        user.args, user.kwargs = map_arg(user.args, put), map_arg(user.kwargs, put)


def _unify_sizes(graph: Graph) -> None:
    """Whole-number sizes that are equal for all calls become one value: the first that is there, or a number."""
    first: dict[Any, Node] = {}
    for node in list(graph.nodes):
        size = value_of(node)
        if not isinstance(size, torch.SymInt) or node.op not in ("placeholder", "call_function", "call_method"):
            continue
        expression = shapes.expression(size, None)
        if node.op != "placeholder" and expression.is_number:
            _replace_by_constant(node, int(expression))
        elif node.op != "placeholder" and expression in first:
            node.replace_all_uses_with(first[expression])
        else:
            first.setdefault(expression, node)
            continue
        if not node.users:
            graph.erase_node(node)


def _sink_allocations(graph: Graph) -> None:
    """New memory is made right before its first use: a buffer for each layer, made in front, makes layers unequal."""
    if any(map(changes_layout, graph.nodes)):
        return  # `empty_like(x)` would ask for another shape later on
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in reversed(list(graph.nodes)):
        if not node.users or not allocates(node):
            continue
        first_use = min(node.users, key=order.__getitem__)
        if first_use.op != "output":
            first_use.prepend(node)
            order[node] = order[first_use]


def allocates(node: Node) -> bool:
    """Whether the call makes new memory and reads none: its values come from constants and sizes alone."""
    if node.op not in ("call_function", "call_method") or not isinstance(value_of(node), torch.Tensor):
        return False
    packet = getattr(node.target, "overloadpacket", node.target)
    name = str(node.target if node.op == "call_method" else getattr(packet, "__name__", ""))
    like = node.args[:1] if name.startswith("new_") or name.endswith("_like") else ()
    reads = (used for used in node.all_input_nodes if isinstance(value_of(used), torch.Tensor) and used not in like)
    return name in _ALLOCATIONS and not any(reads)
