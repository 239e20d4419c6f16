"""Questions about one node of an FX graph: its fake value, the storage that it shows, and whether it changes memory."""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

_IN_PLACE = frozenset(
    {operator.setitem, operator.delitem}
    | {getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand",
                                            "ior", "ixor", "ilshift", "irshift", "imatmul")}
)  # fmt: skip

_CHANGES_LAYOUT = frozenset({"t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "swapdims_", "resize_",
                             "resize_as_", "set_", "as_strided_"})  # fmt: skip


def changes_layout(node: Node) -> bool:
    """Whether the call gives a tensor other sizes or strides in place: another tensor over its memory keeps its own."""
    return node.op == "call_method" and node.target in _CHANGES_LAYOUT


def changes_memory(node: Node) -> bool:
    """Whether the call may change one of its arguments in place."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") if not name.endswith("__") else name.startswith("__i") or name == "__setitem__"
    if node.op != "call_function":
        return False
    return node.target in _IN_PLACE or any(_declares_change(node))


def changed_arguments(node: Node) -> list[Node]:
    """The nodes among the call's arguments that it may change in place; all of them where it doesn't say which."""
    if not changes_memory(node):
        return []
    schema = _schema(node.target)
    if schema is not None:
        given = dict(zip((one.name for one in schema.arguments), node.args, strict=False)) | node.kwargs
        writes = [one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write]
        changed = [given.get(name) for name in writes]
        if all(isinstance(one, Node) for one in changed):
            return changed
    elif (node.op == "call_method" or node.target in _IN_PLACE) and isinstance(node.args[0], Node):
        return [node.args[0]]
    return list(node.all_input_nodes)


def _schema(target: Any) -> Any:
    """The schema of an operator, or of the only overload of a packet; None for anything else."""
    overloads: list[str] = getattr(target, "overloads", list)()
    return getattr(getattr(target, overloads[0]) if len(overloads) == 1 else target, "_schema", None)


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
        parameters = _parameters(node.target)
    except (TypeError, ValueError):
        return False
    at = parameters.index("inplace") if "inplace" in parameters else len(node.args)
    return at < len(node.args) and bool(node.args[at])


@functools.lru_cache(maxsize=256)
def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def computed_nodes(graph: torch.fx.Graph) -> list[Node]:
    """The nodes that compute something, in order: equal graphs have as many."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def module_path(node: Node) -> str:
    """The module from whose forward the call comes, `layers.3.mlp`; "" where it isn't known, or the whole module's."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return re.sub(r"^L\['self'\]\.?", "", path).replace("_modules.", "").replace("._modules", "")


def module_range(paths: Iterable[str]) -> str:
    """The first and the last of the modules of calls in a row: `layers.3.mlp`, `layers.0 to layers.1`."""
    named = [path for path in paths if path]
    if not named:
        return ""
    return named[0] if named[0] == named[-1] else f"{named[0]} to {named[-1]}"


def called(node: Node) -> str:
    """What a call does, by one name for all spellings: `add` for `a + b`, `a.add(b)`, `torch.add`, `aten.add.Tensor`.

    An operator of another library has its full name (`onegraph::linear`); what isn't a call, and a call of anything
    else than torch's functions and Python's operators, has none: "".
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    schema = _schema(node.target)
    if schema is not None or hasattr(node.target, "overloads"):
        namespace, _, name = (schema.name if schema is not None else node.target._qualified_op_name).partition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    module = (getattr(node.target, "__module__", None) or "").partition(".")[0]
    return str(node.target.__name__) if module in ("torch", "_operator", "operator", "") else ""


def linear_operands(node: Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a call of `linear`, however they are passed; None for one that isn't."""
    given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    return given.get("input"), given.get("weight"), given.get("bias")


def value_of(node: Node) -> Any:
    """The node's fake value; None without one."""
    return node.meta.get("example_value", node.meta.get("val"))


def storage_of(node: Node) -> int | None:
    """A key of the storage that a strided tensor shows, None for any other value."""
    return storage_of_value(value_of(node))


def storage_of_value(value: Any) -> int | None:
    """As `storage_of`, for a value itself."""
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        try:
            return int(value.untyped_storage()._cdata)
        except NotImplementedError:  # wrapped by a transform of torch.func
            return None
    return None
