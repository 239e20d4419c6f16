"""Which pieces must run op by op, because what they change is seen through several tensors that cross a border.

A compiler sees one piece. Where a piece changes memory that two of its inputs show, it can't tell for every size how
they overlap; where two of its outputs show memory that a later piece changes, it may give them memory of their own.
Takes the runs of nodes; gives a reason for each of those pieces.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch.fx import Node

from onegraph.split.normalise import value_of

_IN_PLACE = frozenset(
    {operator.setitem, operator.delitem}
    | {getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand",
                                            "ior", "ixor", "ilshift", "irshift", "imatmul")}
)  # fmt: skip


def eager_reason(
    inputs: Iterable[Node], changed: set[int], outputs: Iterable[Node], changed_later: set[int]
) -> str | None:
    """Why a piece can't be compiled, None for nearly all: `changed` are the storages that it changes."""
    if _several_in(inputs, changed):
        return "it changes memory that several of its inputs show"
    if _several_in(outputs, changed_later):
        return "several of its results show memory that is changed later"
    return None


def _several_in(nodes: Iterable[Node], storages: set[int]) -> bool:
    if not storages:
        return False
    return any(count > 1 for storage, count in Counter(map(_storage, nodes)).items() if storage in storages)


def changed_storages(nodes: Iterable[Node]) -> set[int]:
    """The storages of all tensors that are given to a call that may change one."""
    return {
        storage
        for node in nodes
        if changes_memory(node)
        for storage in map(_storage, node.all_input_nodes)
        if storage is not None
    }


def _storage(node: Node) -> int | None:
    value = value_of(node)
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return int(value.untyped_storage()._cdata)
    return None


def changes_memory(node: Node) -> bool:
    """Whether the call may change one of its arguments in place."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    return node.target in _IN_PLACE or any(_declares_change(node))


def _declares_change(node: Node) -> Iterator[bool]:
    target = node.target
    overloads = getattr(target, "overloads", None)
    if hasattr(target, "_schema"):
        yield bool(target._schema.is_mutable)
    elif overloads is not None:
        yield from (bool(getattr(target, name)._schema.is_mutable) for name in overloads())
    else:
        name = str(getattr(target, "__name__", ""))
        yield name.endswith("_") and not name.endswith("__")
        yield node.kwargs.get("out") is not None
        yield _asks_for_inplace(node)


def _asks_for_inplace(node: Node) -> bool:
    if node.kwargs.get("inplace"):
        return True
    try:
        parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    at = parameters.index("inplace") if "inplace" in parameters else len(node.args)
    return at < len(node.args) and bool(node.args[at])
