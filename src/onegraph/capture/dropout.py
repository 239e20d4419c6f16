"""Dropout that decides nothing: its outcome is eager's, which AOTAutograd's decomposition changes.

Takes a captured graph and changes it. Outside of training, or with p = 0, eager's dropout gives its input itself,
where the decomposition gives a copy; with p = 1 eager draws no random numbers, where the decomposition does.
"""

from __future__ import annotations

from typing import Any

import torch

_DROPOUTS = (torch.nn.functional.dropout, torch.dropout)
_PARAMETERS = ("input", "p", "training", "inplace")


def settle_dropout(graph_module: torch.fx.GraphModule) -> int:
    """Rewrites the graph in place; gives the number of dropouts that are gone."""
    graph = graph_module.graph
    settled = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _DROPOUTS:
            continue
        names = _PARAMETERS if node.target is _DROPOUTS[0] else ("input", "p", "training")
        given: dict[str, Any] = {"p": 0.5, "training": True, **dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("train") is not None:
            given["training"] = given["train"]
        source = given.get("input")
        if not isinstance(source, torch.fx.Node):
            continue
        if given["training"] is False or given["p"] == 0.0:
            node.replace_all_uses_with(source)
        elif given["p"] == 1.0 and not given.get("inplace"):
            with graph.inserting_before(node):
                zeros = graph.call_function(torch.mul, (source, 0.0))
            zeros.meta = dict(node.meta)
            node.replace_all_uses_with(zeros)
        else:
            continue
        graph.erase_node(node)
        settled += 1
    if settled:
        graph_module.recompile()
    return settled
