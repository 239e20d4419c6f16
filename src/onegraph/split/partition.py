"""Which operations of a graph belong together: the runs between splitting ops, and the splitting ops themselves.

Takes a normalised graph and the names of splitting ops. Gives runs of nodes in the graph's own order, so that
nothing is reordered: effects, random draws and views stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from onegraph.ir.fx_nodes import value_of
from onegraph.split.normalise import allocates
from onegraph.torch_compat import shapes

_VIEWS = frozenset({"view", "transpose", "permute", "unsqueeze", "squeeze", "t", "select", "narrow", "unflatten",
                    "flatten", "expand", "detach", "size", "sym_size", "swapaxes", "movedim", "view_as"})  # fmt: skip


@dataclass
class Run:
    """Nodes that become one piece; `splits` says that splitting ops are among them."""

    splits: bool
    nodes: list[Node] = field(default_factory=list)


def op_name(node: Node) -> str | None:
    """How `splitting_ops` names the call: `onegraph::paged_attention`, `torch.relu`, `Tensor.view`; else None."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op != "call_function":
        return None
    qualified = getattr(getattr(node.target, "overloadpacket", node.target), "_qualified_op_name", None)
    if qualified is not None:
        return str(qualified)
    module = getattr(node.target, "__module__", None) or "torch"
    return f"{module.lstrip('_')}.{getattr(node.target, '__name__', node.target)}"


def split_into_runs(graph: Graph, splitting_ops: Collection[str]) -> list[Run]:
    """The runs, in order; without splitting ops in the graph there is one."""
    runs: list[Run] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        follows = node.target is operator.getitem and bool(runs) and node.args[0] in runs[-1].nodes[-1:]
        is_item = follows or (bool(runs) and _is_item_of(node, runs[-1]))
        splits = runs[-1].splits if is_item else op_name(node) in splitting_ops
        if not runs or runs[-1].splits != splits:
            runs.append(Run(splits))
        runs[-1].nodes.append(node)
    return _without_trivial_runs(runs)


def _is_item_of(node: Node, run: Run) -> bool:
    """Whether the node takes one value of a call in the run that gives several."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and source in run.nodes and isinstance(value_of(source), tuple | list)


def _without_trivial_runs(runs: list[Run]) -> list[Run]:
    """A run between splitting ops that computes nothing (views, sizes, new memory) joins them."""
    merged: list[Run] = []
    joins = False
    for run in runs:
        trivial = not run.splits and len(runs) > 1 and all(map(_computes_nothing, run.nodes))
        if merged and (joins or (merged[-1].splits and (run.splits or trivial))):
            merged[-1].nodes += run.nodes
            merged[-1].splits |= run.splits
            joins = False
        else:
            merged.append(Run(run.splits, list(run.nodes)))
            joins = trivial
    return merged


def _computes_nothing(node: Node) -> bool:
    if shapes.is_symbolic(value_of(node)) or allocates(node):
        return True
    if node.target is operator.getitem:
        items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return not any(isinstance(item, Node) and isinstance(value_of(item), torch.Tensor) for item in items)
    packet = getattr(node.target, "overloadpacket", node.target)
    name = node.target if node.op == "call_method" else getattr(packet, "__name__", "")
    return name in _VIEWS
