"""remove_no_ops: calls that give what they were given are taken out.

Two kinds. Some show the very memory that they were given, in the same layout (`to` the dtype that it has, `contiguous`
of what is contiguous, two transposes in a row): the fake values say so. Others make new memory of the same values
(`x * 1.0`, a cast to a wider dtype and back): these go where nobody can tell the new memory from the old.

Bits stay: `x + 0.0` is no such call, since it makes 0.0 of -0.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from onegraph.ir.fx_nodes import called, changes_layout, changes_memory, storage_of, value_of
from onegraph.ir.passes import PassContext, layout_of

_SHOW_MEMORY = frozenset({
    "to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "dropout", "detach", "alias",
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "expand", "expand_as", "broadcast_to",
    "transpose", "swapaxes", "swapdims", "permute", "movedim", "t", "T", "mT", "squeeze", "unsqueeze", "getitem",
    "select", "slice", "narrow",
})  # fmt: skip
"""Calls that give a tensor over the memory of their first argument, or a new one."""

_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as"})
_HOLDS = {torch.float64: (torch.float32, torch.float16, torch.bfloat16), torch.float32: (torch.float16, torch.bfloat16)}
"""The dtypes all of whose values a dtype has."""


@dataclass(frozen=True)
class RemoveNoOps:
    """No options."""

    name: ClassVar[str] = "remove_no_ops"
    requires: ClassVar[frozenset[str]] = frozenset()

    def apply(self, graph: Graph, context: PassContext) -> int:
        if any(map(changes_layout, graph.nodes)):
            return 0  # of two tensors over one memory, only one would change
        in_place = any(changes_memory(node) for node in graph.nodes)
        rewrites = 0
        for node in list(graph.nodes):
            if called(node) == "_log_api_usage_once" and not node.users:
                if context.may_rewrite():
                    graph.erase_node(node)
                    rewrites += 1
                continue
            same = shown_before(node)
            if same is None and not in_place:
                same = _copied(node)
                if same is not None and not _is_private(node, same):
                    context.missed(node, "the result is a tensor of its own, which an output shows")
                    continue
            if same is None or tells_objects_apart(node, same) or not context.may_rewrite():
                continue
            context.replace_all({node: same})
            rewrites += 1
        return rewrites


def shown_before(node: Node) -> Node | None:
    """The first node that a chain of views leads back to and that shows the same memory in the same layout."""
    found, shown, at = None, _memory(node), node
    while shown is not None and called(at) in _SHOW_MEMORY and at.args and isinstance(at.args[0], Node):
        at = at.args[0]
        if storage_of(at) != shown[0]:
            break
        if _memory(at) == shown:
            found = at
    return found


def _memory(node: Node) -> tuple[Any, ...] | None:
    """What two tensors have in common that can't be told apart but as objects."""
    storage, value = storage_of(node), value_of(node)
    return None if storage is None else (storage, str(value.storage_offset()), layout_of(value))


def _copied(node: Node) -> Node | None:
    """The tensor whose values a call gives in memory of its own."""
    name, args = called(node), node.args
    same: Any = None
    if not args:
        return None
    if name == "clone" or (name == "dropout" and _drops_nothing(node)):
        same = args[0]
    elif name in _CASTS and isinstance(args[0], Node) and called(args[0]) in _CASTS and _widens(args[0], node):
        same = next(iter(args[0].args), None)
    elif not node.kwargs and len(args) == 2:
        right = {"mul": 1, "multiply": 1, "truediv": 1, "div": 1, "sub": 0}.get(name)
        left = {"mul": 1, "multiply": 1}.get(name)
        same = args[0] if _is_number(args[1], right) else args[1] if _is_number(args[0], left) else None
    old, new = (value_of(same) if isinstance(same, Node) else None), value_of(node)
    if not isinstance(old, torch.Tensor) or layout_of(old) != layout_of(new):
        return None
    return None if old.is_complex() and name != "clone" else same  # a product with 1 + 0j makes NaN of infinity


def _drops_nothing(node: Node) -> bool:
    """Whether it is dropout in eval mode: eager gives the tensor itself, the fake value is a copy."""
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)
    return given.get("training", given.get("train")) is False and not given.get("inplace")


def _widens(cast: Node, back: Node) -> bool:
    """Whether a cast is to a dtype that has all values of the one that `back` casts to again."""
    wide, narrow = value_of(cast), value_of(back)
    return (
        isinstance(wide, torch.Tensor) and narrow.dtype in _HOLDS.get(wide.dtype, ()) and wide.device == narrow.device
    )


def _is_number(value: object, number: int | None) -> bool:
    return type(value) in (int, float) and value == number and str(value)[0] != "-"


def _outputs(graph: Graph) -> Iterator[Node]:
    for node in graph.find_nodes(op="output"):
        yield from node.all_input_nodes


def _is_private(node: Node, same: Node) -> bool:
    """Whether nobody sees that a call's memory is that of another tensor: no output, or the only one that shows it."""
    outputs = {storage_of(one) for one in _outputs(node.graph)}
    inputs = {storage_of(one) for one in node.graph.find_nodes(op="placeholder")}
    return storage_of(node) not in outputs or not {storage_of(same)} & (outputs | inputs)


def tells_objects_apart(node: Node, same: Node) -> bool:
    """Whether an output would become the same object as an input or another output."""
    outputs = set(_outputs(node.graph))
    return node in outputs and (same in outputs or same.op == "placeholder")


def views_of(node: Node) -> list[Node]:
    """What follows and shows the node's memory."""
    storage, found, at = storage_of(node), [], node.next
    while at.op != "output":
        if storage_of(at) == storage:
            found.append(at)
        at = at.next
    return found
