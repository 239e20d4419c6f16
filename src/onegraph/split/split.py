"""Splits a captured graph into pieces at the splitting ops. Each piece is a graph of its own.

Takes a FlatGraph and the names of splitting ops. Gives a SplitGraph whose pieces, run in order, compute the same.
What crosses a border are tensors and whole-number sizes; other symbolic values are computed again where they are
needed. Inputs stand in the order of their first use, so that equal pieces are equal to the letter.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from onegraph.ir.fx_nodes import module_path, module_range, value_of
from onegraph.ir.graph import FlatGraph
from onegraph.ir.piece import Piece, SplitGraph
from onegraph.split.normalise import normalise
from onegraph.split.partition import Run, op_name, split_into_runs
from onegraph.split.shared_memory import changed_storages, eager_reason
from onegraph.torch_compat import shapes


def split_graph(whole: FlatGraph, splitting_ops: Collection[str]) -> SplitGraph:
    """The pieces; one, the graph as it was captured, where none of the splitting ops is in it.

    Normalises `whole.graph_module` in place where it is cut.
    """
    graph = whole.graph_module.graph
    found = [node for node in graph.nodes if op_name(node) in splitting_ops]
    runs = []
    if found:
        normalise(whole.graph_module)
        runs = split_into_runs(graph, splitting_ops)
    (output,) = graph.find_nodes(op="output")
    results = tuple(one.name if isinstance(one, Node) else one for one in output.args[0])
    if len(runs) < 2:
        names = tuple(node.name for node in graph.find_nodes(op="placeholder"))
        values = tuple(dict.fromkeys(one.name for one in output.args[0] if isinstance(one, Node)))
        piece = Piece(0, "compiled", whole.graph_module, whole.fake_inputs, whole.fake_mode, names, values)
        return SplitGraph(whole, (piece,), results)
    changed = [changed_storages(run.nodes) for run in runs]
    pieces = tuple(
        _piece(whole, index, run, splitting_ops, changed[index], set().union(*changed[index + 1 :]))
        for index, run in enumerate(runs)
    )
    return SplitGraph(whole, pieces, results)


def missing_ops(whole: FlatGraph, splitting_ops: Collection[str]) -> tuple[str, ...]:
    """Those of the splitting ops that the graph doesn't call."""
    called = {op_name(node) for node in whole.graph_module.graph.nodes}
    return tuple(op for op in splitting_ops if op not in called)


def called_ops(whole: FlatGraph) -> tuple[str, ...]:
    """The names of all that the graph calls, as `splitting_ops` takes them."""
    names = (op_name(node) for node in whole.graph_module.graph.nodes)
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _piece(
    whole: FlatGraph,
    index: int,
    run: Run,
    splitting_ops: Collection[str],
    changed: set[int],
    changed_later: set[int],
) -> Piece:
    nodes = dict.fromkeys(run.nodes)
    again = list(_computed_again(run.nodes))
    outside = list(dict.fromkeys(_from_outside([*again, *run.nodes])))
    if not run.splits:
        outside += _sizes_to_bind(whole.graph_module.graph, outside)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in outside:
        if node.op != "get_attr":
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = {"example_value": value_of(node)}
    inputs = tuple(node for node in outside if node.op != "get_attr")
    attributes = {str(node.target): _attribute(whole.graph_module, node) for node in outside if node.op == "get_attr"}
    for node in [*(n for n in outside if n.op == "get_attr"), *again, *run.nodes]:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    outputs = [node for node in run.nodes if _crosses(node) and any(user not in nodes for user in node.users)]
    graph.output(tuple(copies[node] for node in outputs))
    graph_module = torch.fx.GraphModule(attributes, graph, class_name=f"Piece{index}")
    return Piece(
        index=index,
        kind="splitting_op" if run.splits else "compiled",
        graph_module=graph_module,
        fake_inputs=tuple(value_of(node) for node in inputs),
        fake_mode=whole.fake_mode,
        inputs=tuple(node.name for node in inputs),
        outputs=tuple(node.name for node in outputs),
        why=_why(run, splitting_ops),
        module_path=module_range(map(module_path, run.nodes)),
        eager_why=eager_reason(inputs, changed, outputs, changed_later),
    )


def _crosses(node: Node) -> bool:
    """Whether the value can go from one piece to another: a tensor or a whole-number size."""
    return isinstance(value_of(node), torch.Tensor | torch.SymInt)


def _from_outside(nodes: Iterable[Node]) -> Iterator[Node]:
    inside = dict.fromkeys(nodes)
    for node in inside:
        for used in node.all_input_nodes:
            if used not in inside:
                yield used


def _sizes_to_bind(graph: Graph, inputs: list[Node]) -> Iterator[Node]:
    """For each symbol in the inputs' sizes that none of them is a plain size for, a value that is one.

    A compiler can't work out `n` from a tensor of `2 * n` rows.
    """
    needed: dict[str, None] = {}
    bound: set[str] = set()
    for node in inputs:
        for size in _sizes(node):
            names = shapes.symbol_names(size)
            needed.update(dict.fromkeys(sorted(names)))
            bound |= names if shapes.is_plain_symbol(size) else set()
    for name in needed:
        if name not in bound:
            plain = (node for node in graph.nodes if _shows(node, name))
            yield from itertools.islice((node for node in plain if node not in inputs), 1)


def _sizes(node: Node) -> tuple[Any, ...]:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return (value,)
    return (*value.shape, *value.stride()) if value.layout == torch.strided else tuple(value.shape)


def _shows(node: Node, symbol: str) -> bool:
    """Whether the value, which may cross a border, has a size that is the symbol itself."""
    if not _crosses(node):
        return False
    return any(shapes.is_plain_symbol(size) and shapes.symbol_names(size) == {symbol} for size in _sizes(node))


def _computed_again(nodes: list[Node]) -> Iterator[Node]:
    """The calls outside whose values can't cross a border (a float of a size, say), before those that use them."""
    inside, found = set(nodes), dict[Node, None]()

    def visit(node: Node) -> None:
        if node in inside or node in found or node.op in ("placeholder", "get_attr") or _crosses(node):
            return
        for used in node.all_input_nodes:
            visit(used)
        found[node] = None

    for node in nodes:
        for used in node.all_input_nodes:
            visit(used)
    yield from found


def _attribute(graph_module: torch.fx.GraphModule, node: Node) -> Any:
    value: Any = graph_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _why(run: Run, splitting_ops: Collection[str]) -> str:
    """The splitting ops in it, each with the user's line; for what is compiled, nothing."""
    told = []
    for node in run.nodes if run.splits else ():
        if op_name(node) in splitting_ops:
            line = shapes.user_line(node.meta.get("stack_trace"))
            told.append(f"{op_name(node)}{f' at {line}' if line else ''}")
    return ", ".join(told)
