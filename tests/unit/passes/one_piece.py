"""A function's graph as one piece, what passes make of it, and its calls as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch._dynamo
from torch._dynamo.decorators import mark_unbacked

import onegraph.ops  # noqa: F401 - registers the ops
from onegraph.ir.fx_nodes import called
from onegraph.ir.passes import Fuel, Pass, PassRun
from onegraph.ir.piece import Piece, SplitGraph
from onegraph.passes.run import PassSettings, run_passes


def piece_of(function: Callable[..., Any], *inputs: torch.Tensor, unbacked: bool = True) -> Piece:
    """As Dynamo traces it, with the first dim of the first input as a symbol."""
    found: list[torch.fx.GraphModule] = []

    def keep(graph_module: torch.fx.GraphModule, _: Any) -> Any:
        found.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    if unbacked:
        mark_unbacked(inputs[0], 0)
    with torch.no_grad():
        torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    (graph_module,) = found
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    (output,) = graph_module.graph.find_nodes(op="output")
    return Piece(
        index=0,
        kind="compiled",
        graph_module=graph_module,
        fake_inputs=tuple(node.meta["example_value"] for node in placeholders),
        fake_mode=None,
        inputs=tuple(node.name for node in placeholders),
        outputs=tuple(f"out_{index}" for index in range(len(output.args[0]))),
    )


def rewritten(piece: Piece, *passes: Pass, fuel: int | None = None) -> tuple[Piece, tuple[PassRun, ...]]:
    """The piece after the passes, each checked in fp64, with their records."""
    split = SplitGraph(cast(Any, None), (piece,), piece.outputs)
    facts = frozenset({"rotary_kernel", "linear_kernels"})
    passed = run_passes(split, PassSettings(passes, None, facts, check=True, fuel=Fuel(fuel)))
    return passed.pieces[0], passed.runs[0]


def calls(piece: Piece) -> list[str]:
    """What the graph calls, in order, and what it returns."""
    told = []
    for node in piece.graph_module.graph.nodes:
        if node.op in ("call_function", "call_method"):
            given = [*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())]
            told.append(f"{node.name} = {called(node) or node.target}({', '.join(given)})")
        elif node.op == "output":
            told.append(f"return {', '.join(map(str, node.args[0]))}")
    return told
