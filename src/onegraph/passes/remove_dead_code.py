"""remove_dead_code: calls that nobody uses and that do nothing else are taken out.

What may do something stays: changes in place, random numbers (which move the generator on), checks, ops of others
that don't say, and what finds a size in the data, which other values may have.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from onegraph.ir.fx_nodes import called, changes_memory, value_of
from onegraph.ir.passes import PassContext, makes_symbols

_DO_MORE = frozenset({
    "batch_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "instance_norm", "embedding",
    "embedding_bag", "scaled_dot_product_attention",
})  # fmt: skip
"""Functions that don't say so and may change their arguments (running statistics, a renormed table) or draw numbers."""

_OWN = "onegraph::"


@dataclass(frozen=True)
class RemoveDeadCode:
    """No options."""

    name: ClassVar[str] = "remove_dead_code"
    requires: ClassVar[frozenset[str]] = frozenset()

    def apply(self, graph: Graph, context: PassContext) -> int:
        rewrites = 0
        for node in reversed(list(graph.nodes)):
            if not node.users and _does_nothing_else(node) and context.may_rewrite():
                graph.erase_node(node)
                rewrites += 1
        return rewrites


def _does_nothing_else(node: Node) -> bool:
    name = called(node)
    if not name or value_of(node) is None or changes_memory(node) or makes_symbols(node):
        return False
    if name.startswith(_OWN):
        return True  # those that change something say so in their schemas
    if name in _DO_MORE:
        return False
    known = _overloads(name)
    is_random = any(torch.Tag.nondeterministic_seeded in one.tags for one in known)
    return not is_random and (bool(known) or hasattr(operator, name))


def _overloads(name: str) -> list[Any]:
    """The overloads of torch's own operator of that name; none where there isn't one."""
    packet = getattr(torch.ops.aten, name, None)
    return [getattr(packet, one) for one in packet.overloads()] if packet is not None else []
