"""Inference mode that a module enters itself: compiled code runs without gradients anyway.

Takes a captured graph and changes it. AOTAutograd can't trace a graph that enters inference mode.
"""

from __future__ import annotations

import torch

_SWITCHES = (torch.autograd.grad_mode._enter_inference_mode, torch.autograd.grad_mode._exit_inference_mode)


def drop_inference_mode(graph_module: torch.fx.GraphModule) -> None:
    """Rewrites the graph in place. What eager would give as inference tensors are plain tensors then."""
    graph = graph_module.graph
    switches = [node for node in graph.nodes if node.op == "call_function" and node.target in _SWITCHES]
    for node in reversed(switches):  # the exit names its entry
        graph.erase_node(node)
    if switches:
        graph_module.recompile()
