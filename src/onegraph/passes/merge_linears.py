"""merge_linears: linear layers with one input become one, whose weight has the rows of all of theirs.

Queries, keys and values; gate and up projection. One kernel reads the input once and has more rows to share among
threads. The weights are merged in memory, with the originals as views, so only where somebody owns them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from onegraph.ir.fx_nodes import called, changed_arguments, linear_operands, storage_of, value_of
from onegraph.ir.passes import PassContext


@dataclass(frozen=True)
class MergeLinears:
    """`most` is the largest number of layers that become one."""

    name: ClassVar[str] = "merge_linears"
    requires: ClassVar[frozenset[str]] = frozenset()
    most: int = 8

    def __post_init__(self) -> None:
        if type(self.most) is not int or self.most < 2:
            raise ValueError("most is a whole number of 2 or more")

    def apply(self, graph: Graph, context: PassContext) -> int:
        rewrites = 0
        for group in _groups(graph, context):
            for start in range(0, len(group), self.most):
                nodes = group[start : start + self.most]
                if len(nodes) == 1:
                    continue
                why_not = _why_not(nodes, context)
                if why_not:
                    context.missed(nodes[0], why_not)
                else:
                    rewrites += _merge(nodes, context)
        return rewrites


def _groups(graph: Graph, context: PassContext) -> Iterator[list[Node]]:
    """Linear layers of the same input, two or more, each with a weight of the module."""
    found: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if called(node) == "linear":
            x, weight, _ = linear_operands(node)
            if isinstance(x, Node) and weight in context.weights:
                found.setdefault(x, []).append(node)
    yield from (nodes for nodes in found.values() if len(nodes) > 1)


def _why_not(nodes: list[Node], context: PassContext) -> str:
    """Why the layers can't be one; "" where they can."""
    weights, biases = zip(*(linear_operands(node)[1:] for node in nodes), strict=True)
    if len(set(weights)) < len(weights):
        return "two of the layers have the same weight"
    if any(bias is None for bias in biases) and any(biases):
        return "some of the layers have a bias and others don't"
    if any(bias is not None and bias not in context.weights for bias in biases):
        return "a bias is no weight of the module"
    values = [value_of(weight) for weight in weights]
    if len({(value.dtype, value.device) for value in values}) > 1:
        return "the layers' weights differ in dtype"
    if _is_changed_between(nodes):
        return "the input or a weight is changed in place between the layers"
    if _is_layout_read(nodes):
        return "the strides of a layer's result are read"
    return ""


def _is_changed_between(nodes: list[Node]) -> bool:
    read = {storage_of(one) for node in nodes for one in linear_operands(node) if isinstance(one, Node)}
    node = nodes[0]
    while node is not nodes[-1]:
        if any(storage_of(one) in read for one in changed_arguments(node)):
            return True
        node = node.next
    return False


def _is_layout_read(nodes: list[Node]) -> bool:
    """Whether a call may go by the strides of a result or of a view of it: `as_strided`, ops of others."""
    shown = {storage_of(node) for node in nodes}
    for user in nodes[0].graph.nodes:
        name = called(user)
        goes_by = name in ("as_strided", "") or ("::" in name and not name.startswith("onegraph::"))
        is_call = user.op in ("call_function", "call_method")
        if is_call and goes_by and shown & set(map(storage_of, user.all_input_nodes)):
            return True
    return False


def _merge(nodes: list[Node], context: PassContext) -> bool:
    """Puts one layer in the place of all of them; each user gets its columns of the result."""
    x, _, bias = linear_operands(nodes[0])
    operands = [x]
    for index in (1, 2) if bias is not None else (1,):
        merged = context.merge([linear_operands(node)[index] for node in nodes])
        if isinstance(merged, str):
            context.missed(nodes[0], merged)
            return False
        operands.append(merged)
    if not context.may_rewrite():
        return False
    graph = nodes[0].graph
    with graph.inserting_before(nodes[0]):
        whole = context.call(torch.nn.functional.linear, (*operands, *([] if bias is not None else [None])), nodes[0])
        parts, at = {}, 0
        for node in nodes:
            rows = value_of(linear_operands(node)[1]).shape[0]
            parts[node] = context.call("narrow", (whole, -1, at, rows), node)
            at += rows
    try:
        context.replace_all(parts)
    except Exception:  # noqa: BLE001 - whatever a user says that can't take columns of a wider tensor, such as `view`
        copies = {}
        for old, part in parts.items():
            with graph.inserting_after(part):
                copy = copies[old] = context.call("contiguous", (part,), part)
            part.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
        context.replace_all(copies)
    return True
