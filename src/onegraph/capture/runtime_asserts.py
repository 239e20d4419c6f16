"""Runtime assertions on sizes that the ledger of shapes has judged: the graph need not ask them again on each call.

Takes a captured graph whose conditions on declared dims are proven over the range, or are predicates of its region,
and changes it. What torch asserts about sizes that depend on data stays.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from onegraph.torch_compat.shapes import is_assertion, is_symbolic, symbol_names


def drop_judged_asserts(graph_module: torch.fx.GraphModule, symbols: Collection[str]) -> int:
    """Removes in place the assertions about symbols of declared dims alone; gives the number removed."""
    graph = graph_module.graph
    dropped = 0
    for node in reversed(graph.nodes):  # a condition comes up after its only use is gone
        if is_assertion(node):
            names = _symbols_behind(node.args[0])
            if names and names <= set(symbols):
                graph.erase_node(node)
                dropped += 1
        elif dropped and node.op == "call_function" and not node.users and is_symbolic(_value(node)):
            graph.erase_node(node)
    if dropped:
        graph_module.recompile()
    return dropped


def _symbols_behind(condition: Any) -> set[str]:
    """Those of the condition and of all sizes that it is computed from: equal ones may be replaced in itself."""
    if not isinstance(condition, torch.fx.Node) or not is_symbolic(_value(condition)):
        return set()
    return symbol_names(_value(condition)).union(*map(_symbols_behind, condition.all_input_nodes))


def _value(node: torch.fx.Node) -> Any:
    return node.meta.get("example_value")
