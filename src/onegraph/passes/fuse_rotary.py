"""fuse_rotary: the rotary position embedding of queries and keys becomes one `onegraph::rotary`.

Matches `x * cos + cat((-x[half:], x[:half])) * sin` over a whole head, or over its first elements with the others put
back by a `cat`, for a pair of queries and keys that share `cos` and `sin`. Inductor materialises each `cat`; the op
reads and writes once. Its products are rounded before they are added, as they are op by op.

Letters: T tokens, H heads, D head size, R the part of it that turns.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from onegraph.ir.fx_nodes import called, changes_memory, value_of
from onegraph.ir.passes import PassContext
from onegraph.passes.remove_no_ops import shown_before, tells_objects_apart, views_of

ROTARY_KERNEL = "rotary_kernel"
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class FuseRotary:
    """No options."""

    name: ClassVar[str] = "fuse_rotary"
    requires: ClassVar[frozenset[str]] = frozenset({ROTARY_KERNEL})

    def apply(self, graph: Graph, context: PassContext) -> int:
        rewrites = 0
        groups: dict[tuple[Node, Node], list[_Turned]] = {}
        for node in graph.nodes:
            turned = _match(node, context)
            if turned is not None:
                groups.setdefault((turned.cos, turned.sin), []).append(turned)
        for group in groups.values():
            for queries, keys in zip(group[::2], group[1::2], strict=False):
                rewrites += _fuse(queries, keys, context)
            if len(group) % 2:
                context.missed(group[-1].result, "there are no keys beside it that turn alike")
        return rewrites


@dataclass(frozen=True)
class _Turned:
    """`result` is `x` turned by `cos` and `sin`, which are laid out to fit it; `heads` is the dim of its heads."""

    result: Node
    x: Node
    cos: Node
    sin: Node
    heads: int


def _match(node: Node, context: PassContext) -> _Turned | None:
    """What a sum turns; near misses are recorded."""
    if called(node) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    for straight, crossed in (node.args, node.args[::-1]):
        for x, cos in _orders(straight):
            for half, sin in _orders(crossed):
                if _is_half_turn(half, x):
                    return _checked(node, x, cos, sin, context)
                stacked = _argument(half)
                if called(half) in ("flatten", "reshape", "view") and stacked and called(stacked) == "stack":
                    context.missed(node, "the elements of a pair lie side by side")
                    return None
    return None


def _orders(product: Any) -> Iterator[tuple[Node, Node]]:
    """The factors of a product of two tensors, in both orders."""
    if isinstance(product, Node) and called(product) == "mul" and len(product.all_input_nodes) == 2:
        first, second = product.args
        if isinstance(first, Node) and isinstance(second, Node):
            yield first, second
            yield second, first


def _is_half_turn(node: Node, x: Node) -> bool:
    """Whether it is `cat((-x[..., R / 2 :], x[..., : R / 2]), -1)`."""
    parts = _concatenated(node)
    if len(parts) != 2 or called(parts[0]) != "neg":
        return False
    size = value_of(x).shape[-1]
    if not isinstance(size, int) or size % 2:
        return False
    return _columns(_argument(parts[0])) == (x, size // 2, size) and _columns(parts[1]) == (x, 0, size // 2)


def _concatenated(node: Node) -> tuple[Node, ...]:
    """What a `cat` along the last dim puts together."""
    if called(node) not in ("cat", "concat"):
        return ()
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = node.args[0]
    is_last = isinstance(value_of(node), torch.Tensor) and dim in (-1, value_of(node).dim() - 1)
    return tuple(parts) if is_last and isinstance(parts, tuple | list) and set(node.kwargs) <= {"dim"} else ()


def _columns(node: Any) -> tuple[Node, int, int] | None:
    """The tensor of whose last dim a node is a range, with the range: `x[..., a:b]`."""
    if (
        not isinstance(node, Node)
        or called(node) != "getitem"
        or not isinstance(node.args[1], tuple)
        or len(node.args[1]) != 2
    ):
        return None
    rest, columns = node.args[1]
    of = value_of(node.args[0])
    if rest is not Ellipsis or not isinstance(columns, slice) or not isinstance(of, torch.Tensor):
        return None
    ends = (columns.start, columns.stop, columns.step, of.shape[-1])
    if not all(one is None or isinstance(one, int) for one in ends):
        return None
    start, stop, step = columns.indices(int(of.shape[-1]))
    return (node.args[0], start, stop) if step == 1 else None


def _argument(node: Node) -> Node | None:
    """The first argument, where it is a node that is passed by place."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, Node) else None


def _checked(node: Node, x: Node, cos: Node, sin: Node, context: PassContext) -> _Turned | None:
    """The match with the elements that don't turn, where its layout is one that the op takes."""
    whole = _with_rest(node, x)
    turned = _Turned(*(whole or (node, x)), cos, sin, _head_dim(value_of(x), value_of(cos)))
    values = [value_of(one) for one in (node, x, cos, sin)]
    if values[0].dtype not in _DTYPES or len({(value.dtype, value.device) for value in values}) > 1:
        context.missed(node, "queries, cos and sin aren't all of one dtype, float32 or bfloat16")
    elif turned.heads < 0 or str(values[2].shape) != str(values[3].shape):
        context.missed(node, "the dims of tokens and heads can't be told from cos")
    else:
        return turned
    return None


def _with_rest(node: Node, x: Node) -> tuple[Node, Node] | None:
    """`cat((node, whole[..., R:]), -1)` and `whole`, of which `x` is `whole[..., :R]`; nothing else uses the sum.

    The rest may be empty: a model that can leave one out may have none.
    """
    user = next(iter(node.users))
    parts = _concatenated(user) if len(node.users) == 1 else ()
    if len(parts) != 2 or parts[0] is not node:
        return None
    size = value_of(x).shape[-1]
    for whole, _, end in filter(None, (_columns(x), (x, 0, size))):
        if _columns(parts[1]) == (whole, end, value_of(whole).shape[-1]) and end == size:
            return user, whole
    return None


def _head_dim(x: torch.Tensor, cos: torch.Tensor) -> int:
    """The dim of heads of `x`, [T, H, D] or [H, T, D], with a dim of 1 in front or without; -1 if it can't be told."""
    if x.dim() != cos.dim() or x.dim() not in (3, 4) or (x.dim() == 4 and not _is_one(x.shape[0], cos.shape[0])):
        return -1
    dims = (x.dim() - 3, x.dim() - 2)
    heads = [dim for dim in dims if _is_one(cos.shape[dim]) and isinstance(x.shape[dim], int)]
    tokens = [dim for dim in dims if dim not in heads]
    return heads[0] if len(heads) == 1 and len(tokens) == 1 and _equal(x.shape[tokens[0]], cos.shape[tokens[0]]) else -1


def _is_one(*sizes: Any) -> bool:
    return all(isinstance(size, int) and size == 1 for size in sizes)


def _equal(first: Any, second: Any) -> bool:
    """Whether two sizes are the same number or expression; makes no guard."""
    return str(first) == str(second)


def _fuse(queries: _Turned, keys: _Turned, context: PassContext) -> int:
    graph = queries.result.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    last = max((queries.x, keys.x, keys.cos, keys.sin), key=order.__getitem__)
    if any(order[user] <= order[last] for user in queries.result.users):
        context.missed(keys.result, "the queries are used before the keys are there")
        return 0
    nodes = list(graph.nodes)
    replaced = _parts(queries) | _parts(keys)
    places = [order[node] for node in replaced | {last}]
    if any(map(changes_memory, nodes[min(places) : max(places)])):
        context.missed(keys.result, "something is changed in place between the queries and the keys")
        return 0
    if not context.may_rewrite():
        return 0
    with graph.inserting_before(next(node for node in nodes[order[last] + 1 :] if node.op != "placeholder")):
        rows = [_rows(one, keys.heads, context) for one in (keys.cos, keys.sin)]
        flat = [_flat(one, context) for one in (queries, keys)]
        both = context.call(torch.ops.onegraph.rotary.default, (*flat, *rows), keys.result)
        turned = {one.result: _as_it_was(one, both, index, context) for index, one in enumerate((queries, keys))}
    context.replace_all(turned)
    for one in turned.values():
        _undo_views(one)
    _erase_unused(replaced - turned.keys() | set(turned.values()))
    return 1


def _rows(node: Node, heads: int, context: PassContext) -> Node:
    """`cos` or `sin` without the dim for heads."""
    if called(node) == "unsqueeze" and node.args[1:] in ((heads,), (heads - value_of(node).dim(),)):
        return node.args[0]  # type: ignore[return-value]
    return context.call("select", (node, heads, 0), node)


def _flat(one: _Turned, context: PassContext) -> Node:
    """Queries or keys as [T, H, D]."""
    x, heads = one.x, one.heads
    if value_of(x).dim() == 4:
        x, heads = context.call("select", (x, 0, 0), x), heads - 1
    return context.call("transpose", (x, 0, 1), x) if heads == 0 else x


def _as_it_was(one: _Turned, both: Node, index: int, context: PassContext) -> Node:
    """A result of the op, [T, H, D], in the shape that queries or keys had."""
    result = context.call(operator.getitem, (both, index), one.result)
    is_batch = value_of(one.x).dim() == 4
    if one.heads - is_batch == 0:
        result = context.call("transpose", (result, 0, 1), one.result)
    return context.call("unsqueeze", (result, 0), one.result) if is_batch else result


def _parts(one: _Turned) -> set[Node]:
    """The nodes from which a result was made, down to the operands of the op."""
    found: set[Node] = set()
    left = [one.result]
    while left:
        node = left.pop()
        if node not in found and node not in (one.x, one.cos, one.sin):
            found.add(node)
            left += node.all_input_nodes
    return found


def _undo_views(node: Node) -> None:
    """Has what only goes back to the op's own layout read the op's result."""
    for view in views_of(node):
        same = shown_before(view)
        if same is not None and not tells_objects_apart(view, same):
            view.replace_all_uses_with(same)
            view.graph.erase_node(view)


def _erase_unused(nodes: set[Node]) -> None:
    (graph,) = {node.graph for node in nodes}
    for node in reversed(graph.nodes):
        if node in nodes and not node.users:
            graph.erase_node(node)
