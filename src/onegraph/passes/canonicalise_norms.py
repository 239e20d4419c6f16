"""canonicalise_norms: an RMSNorm, and the residual add before it, get one spelling, whichever the model has.

The canonical form is `h = residual + x; h * rsqrt(mean(h.pow(2), -1, keepdim=True) + eps)`, in the model's precision.
Passes after it match that alone, and layers that only spell it differently are equal pieces. Inductor makes one kernel
of each spelling, so speed is no reason.

Letters: v the mean of squares with eps added, h what is normed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from onegraph.ir.fx_nodes import called, changed_arguments, storage_of, value_of
from onegraph.ir.passes import PassContext, layout_of

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CanonicaliseNorms:
    """No options."""

    name: ClassVar[str] = "canonicalise_norms"
    requires: ClassVar[frozenset[str]] = frozenset()

    def apply(self, graph: Graph, context: PassContext) -> int:
        rewrites = 0
        for node in list(graph.nodes):
            if called(node) == "rms_norm":
                rewrites += _spell_out(node, context)
        for node in list(graph.nodes):
            if _is_mean_of_squares_and_eps(node):
                for root in _inverse_roots(node):
                    rewrites += _respell_root(root, node, context)
                rewrites += _respell_squares(node, context)
                rewrites += _order_residual(_normed(node), context)
        return rewrites


def _spell_out(node: Node, context: PassContext) -> int:
    """`F.rms_norm` over the last dim, as torch's own decomposition computes it: in fp32 for narrower dtypes."""
    given = dict(zip(("input", "normalized_shape", "weight", "eps"), node.args, strict=False)) | dict(node.kwargs)
    x, weight, eps = given["input"], given.get("weight"), given.get("eps")
    value = value_of(x)
    if len(given["normalized_shape"]) != 1:
        context.missed(node, "it norms more than the last dim")
    elif eps is None:
        context.missed(node, "its eps is left to torch")
    elif not isinstance(value, torch.Tensor) or not value.is_floating_point():
        context.missed(node, "what it norms isn't known to be of floats")
    elif isinstance(weight, Node) and value_of(weight).dtype != value.dtype:
        context.missed(node, "its weight is of another dtype")
    elif context.may_rewrite():
        is_narrow = value.dtype in _HALF
        with node.graph.inserting_before(node):
            wide = context.call("to", (x, torch.float32), node) if is_narrow else x
            mean = context.call("mean", (context.call("pow", (wide, 2), node), -1), node, keepdim=True)
            scale = context.call(torch.rsqrt, (context.call("add", (mean, eps), node),), node)
            made = context.call("mul", (wide, scale), node)
            made = context.call("mul", (made, weight), node) if weight is not None else made
            made = context.call("to", (made, value.dtype), node) if is_narrow else made
        context.replace_all({node: made})
        return 1
    return 0


def _is_mean_of_squares_and_eps(node: Node) -> bool:
    """Whether it is `mean(h ** 2, -1, keepdim=True) + eps`."""
    if called(node) != "add" or len(node.all_input_nodes) != 1 or len(node.args) != 2 or node.kwargs:
        return False
    mean = node.all_input_nodes[0]
    if called(mean) != "mean" or not mean.args or not isinstance(mean.args[0], Node):
        return False
    given = dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)) | dict(mean.kwargs)
    value = value_of(mean.args[0])
    last = value.dim() - 1 if isinstance(value, torch.Tensor) else -1
    dims = given.get("dim")
    dims = dims if isinstance(dims, int) else dims[0] if isinstance(dims, tuple | list) and len(dims) == 1 else None
    return dims in (-1, last) and given.get("keepdim") is True and _squared(mean.args[0]) is not None


def _squared(node: Node) -> Node | None:
    """`h`, of its square in any spelling."""
    name, args = called(node), node.args
    if name == "square" or (name == "pow" and args[1:] == (2,)):
        return args[0] if isinstance(args[0], Node) else None
    if name in ("mul", "multiply") and len(args) == 2 and args[0] is args[1] and isinstance(args[0], Node):
        return args[0]
    return None


def _normed(v: Node) -> Node:
    h = _squared(v.all_input_nodes[0].args[0])  # type: ignore[arg-type]
    assert h is not None
    return h


def _inverse_roots(v: Node) -> Iterator[Node]:
    """`1 / sqrt(v)` and quotients by `sqrt(v)`, where they aren't spelled by `rsqrt`."""
    for user in list(v.users):
        if called(user) == "pow" and user.args[1:] == (-0.5,):
            yield user
        elif called(user) == "sqrt":
            for outer in list(user.users):
                if called(outer) in ("reciprocal", "truediv", "div", "true_divide") and _divisor(outer) is user:
                    yield outer


def _divisor(node: Node) -> Any:
    if called(node) == "reciprocal":
        return node.args[0]
    return node.args[1] if len(node.args) == 2 and not node.kwargs else None


def _respell_root(node: Node, v: Node, context: PassContext) -> int:
    """By `rsqrt(v)`."""
    numerator = node.args[0] if called(node) not in ("pow", "reciprocal") else 1
    is_tensor = isinstance(numerator, Node) and isinstance(value_of(numerator), torch.Tensor)
    read = {storage_of(v), *map(storage_of, v.users)}
    is_changed = any(storage_of(one) in read for other in v.graph.nodes for one in changed_arguments(other))
    if is_changed or not (is_tensor or numerator == 1) or not context.may_rewrite():
        return 0
    with node.graph.inserting_before(node):
        made = context.call(torch.rsqrt, (v,), node)
        if isinstance(numerator, Node):
            made = context.call("mul", (numerator, made), node)
    context.replace_all({node: made})
    return 1


def _respell_squares(v: Node, context: PassContext) -> int:
    """`h * h` and `square(h)` by `h.pow(2)`."""
    square = v.all_input_nodes[0].args[0]
    assert isinstance(square, Node)
    if called(square) == "pow" or len(square.users) != 1 or not context.may_rewrite():
        return 0
    with square.graph.inserting_before(square):
        made = context.call("pow", (_normed(v), 2), square)
    context.replace_all({square: made})
    return 1


def _order_residual(h: Node, context: PassContext) -> int:
    """The residual stream, which is there before what a layer adds to it, stands first in their sum."""
    while called(h) in ("to", "float") and isinstance(h.args[0], Node):
        h = h.args[0]
    if called(h) != "add" or len(h.args) != 2 or h.kwargs or not all(isinstance(one, Node) for one in h.args):
        return 0
    order = {node: number for number, node in enumerate(h.graph.nodes)}
    first, second = h.args
    layout = layout_of(value_of(first))  # type: ignore[arg-type]
    same = layout is not None and layout == layout_of(value_of(second))  # type: ignore[arg-type]
    if not same or order[first] <= order[second] or not context.may_rewrite():  # type: ignore[index]
        return 0
    h.args = (second, first)
    return 1
