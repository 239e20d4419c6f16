"""move_rotary: a rotary at a piece's end moves into the next piece's write of the KV cache.

`onegraph::rotary` and `onegraph::write_kv_cache` become one `onegraph::rotary_write_kv_cache`, among the splitting
ops, which are called without the dispatcher. Keys are turned right into the cache and no longer written twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from onegraph.ir.fx_nodes import called, changed_arguments, storage_of, value_of
from onegraph.ir.passes import Border, graph_copy
from onegraph.ir.piece import Piece
from onegraph.passes.fuse_rotary import ROTARY_KERNEL


@dataclass(frozen=True)
class MoveRotary:
    """No options."""

    name: ClassVar[str] = "move_rotary"
    requires: ClassVar[frozenset[str]] = frozenset({ROTARY_KERNEL})

    def rewrite(self, border: Border) -> tuple[Piece, Piece] | str | None:
        if not any(called(node) == "onegraph::rotary" for node in border.before.graph_module.graph.nodes):
            return None
        if len(set(_results(border.before))) < len(border.before.outputs):
            return "a value is returned twice"
        before = _Side(border.before)
        rotary = next(node for node in before.graph.nodes if called(node) == "onegraph::rotary")
        return _moved(rotary, before, _Side(border.after), border.private)


def _results(piece: Piece) -> tuple[Any, ...]:
    (output,) = piece.graph_module.graph.find_nodes(op="output")
    return tuple(output.args[0])


class _Side:
    """A piece with a graph of its own, and the names of what goes in and out by node."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.graph_module = graph_copy(piece.graph_module)
        self.graph: Graph = self.graph_module.graph
        (self.output,) = self.graph.find_nodes(op="output")
        self.inputs: dict[Node, str] = dict(zip(self.graph.find_nodes(op="placeholder"), piece.inputs, strict=True))
        results: Any = self.output.args[0]
        self.outputs: dict[Node, str] = dict(zip(results, piece.outputs, strict=True))

    def input(self, name: str) -> Node:
        return next(node for node, known in self.inputs.items() if known == name)

    def take(self, name: str, value: Any) -> Node:
        """The input of that name; a new one, the last, where there is none."""
        if name not in self.inputs.values():
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                node = self.graph.placeholder(name)
            node.meta = {"example_value": value}
            self.inputs[node] = name
        return self.input(name)

    def return_instead(self, instead: dict[Node, Node], suffix: str) -> None:
        """Returns other nodes, under other names; what is then unused is erased."""
        self.outputs = {
            instead.get(node, node): f"{name}_{suffix}" if node in instead else name
            for node, name in self.outputs.items()
        }
        self.output.args = (tuple(self.outputs),)
        for node in instead:
            (call,) = node.all_input_nodes
            self.graph.erase_node(node)
            if not call.users:
                self.graph.erase_node(call)

    def crossing(self, node: Node) -> str:
        """The name under which others know the node's value; as a further output where none did."""
        if node not in self.inputs:
            self.outputs.setdefault(node, f"{node.name}_of_piece_{self.piece.index}")
            self.output.args = (tuple(self.outputs),)
        return (self.inputs | self.outputs)[node]

    def drop(self, nodes: Iterable[Node]) -> None:
        """Has the piece no longer take those inputs that nothing uses."""
        for node in nodes:
            if node in self.inputs and not node.users:
                self.graph.erase_node(node)
                del self.inputs[node]

    def finish(self) -> Piece:
        self.graph.lint()
        self.graph_module.recompile()
        return replace(
            self.piece,
            graph_module=self.graph_module,
            fake_inputs=tuple(value_of(node) for node in self.inputs),
            inputs=tuple(self.inputs.values()),
            outputs=tuple(self.outputs.values()),
        )


def _from(node: Node) -> Iterable[Node]:
    return itertools.dropwhile(lambda one: one is not node, node.graph.nodes)


def _moved(rotary: Node, before: _Side, after: _Side, private: frozenset[str]) -> tuple[Piece, Piece] | str:
    results = {user.args[1]: user for user in rotary.users}
    turned, given, by = [results.get(0), results.get(1)], rotary.args[:2], rotary.args[2:]
    if not all(one is not None and before.outputs.get(one) in private and len(one.users) == 1 for one in turned):
        return "others than the splitting ops read the turned queries or keys"
    q, k = (after.input(before.outputs[one]) for one in turned)
    write = next(iter(k.users))
    if len(k.users) != 1 or called(write) != "onegraph::write_kv_cache" or write.args[:1] != (k,):
        return "the keys go elsewhere than into the KV cache"
    if len(write.args) != 5:
        return "the cache is written by keyword"
    if given[0] is given[1] or any(one in before.outputs for one in given):
        return "the unturned queries or keys are returned too"
    order = {node: number for number, node in enumerate(after.graph.nodes)}
    if after.output in q.users or any(order[user] < order[write] for user in q.users):
        return "the queries are read before the keys are written, or returned"
    crossing = [*given, *(one for one in by if one not in before.inputs)]
    if {storage_of(one) for one in crossing} & {storage_of(one) for one in before.inputs}:
        return "queries, keys, cos or sin show memory that the piece was given"
    read = {storage_of(one) for one in (*given, *by)}
    between = (*_from(rotary), *itertools.takewhile(lambda node: node is not write, after.graph.nodes))
    if any(storage_of(one) in read for node in between for one in changed_arguments(node)):
        return "queries, keys, cos or sin are changed in place before the keys are written"
    before.return_instead(dict(zip(turned, given, strict=True)), "unturned")
    turned_q = value_of(q)
    for old, new in zip((q, k), given, strict=True):
        after.inputs[old] = before.outputs[new]
        old.meta = {"example_value": value_of(new)}
    cos, sin = (after.take(before.crossing(one), value_of(one)) for one in by)
    with after.graph.inserting_before(write):
        call = after.graph.call_function(
            torch.ops.onegraph.rotary_write_kv_cache.default, (q, k, write.args[1], cos, sin, *write.args[2:])
        )
    q.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    call.meta = {**write.meta, "example_value": turned_q}
    after.graph.erase_node(write)
    before.drop(by)
    return before.finish(), after.finish()
