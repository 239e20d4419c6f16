"""Passes of users, as `extra_passes` names them: right, wrong, raising, and with options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph

from onegraph.ir.fx_nodes import called
from onegraph.ir.passes import PassContext


@dataclass(frozen=True)
class SquareByProduct:
    """`x.pow(2)` becomes `x * x`."""

    name: ClassVar[str] = "square_by_product"
    requires: ClassVar[frozenset[str]] = frozenset()

    def apply(self, graph: Graph, context: PassContext) -> int:
        rewrites = 0
        for node in list(graph.nodes):
            if called(node) != "pow":
                continue
            if node.args[1] != 2:
                context.missed(node, f"the power is {node.args[1]}")
            elif context.may_rewrite():
                with graph.inserting_before(node):
                    context.replace_all({node: context.call("mul", (node.args[0], node.args[0]), node)})
                rewrites += 1
        return rewrites


@dataclass(frozen=True)
class AddToSine:
    """`x.sin()` becomes `x.sin() + by`: wrong, unless `by` is 0. Written by hand, with no help of the context."""

    name: ClassVar[str] = "add_to_sine"
    by: float = 0.0

    def apply(self, graph: Graph, context: Any) -> int:
        nodes = [node for node in graph.nodes if called(node) == "sin"]
        for node in nodes:
            with graph.inserting_after(node):
                added = graph.call_function(torch.add, (node, self.by))
            node.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
        return len(nodes)


@dataclass(frozen=True)
class Raises:
    """Fails on every graph."""

    name: ClassVar[str] = "raises"

    def apply(self, graph: Graph, context: Any) -> int:
        raise ZeroDivisionError("planted")


@dataclass(frozen=True)
class NeedsWings:
    """Asks for a fact that no target declares."""

    name: ClassVar[str] = "needs_wings"
    requires: ClassVar[frozenset[str]] = frozenset({"wings"})

    def apply(self, graph: Graph, context: Any) -> int:
        raise AssertionError("never called")


class NoDataclass:
    name = "no_dataclass"

    def apply(self, graph: Graph, context: Any) -> int:
        return 0


@dataclass(frozen=True)
class Breaks:
    """Does what a pass must not: `adds` or `removes` inputs, gives no number (`none`), or not the right one."""

    name: ClassVar[str] = "breaks"
    what: str = "none"

    def apply(self, graph: Graph, context: Any) -> Any:
        (output,) = graph.find_nodes(op="output")
        if self.what == "adds":
            with graph.inserting_before(next(iter(graph.nodes))):
                graph.placeholder("more")
        elif self.what == "removes":
            output.args = (output.args[0][:-1],)
        elif self.what == "silent":
            next(node for node in graph.nodes if called(node) == "sin").target = "cos"
        return None if self.what == "none" else int(self.what != "silent")
