"""Plans a split graph: the calls in order, and after each one the values that are no longer needed.

Takes a SplitGraph. Gives an ExecutionPlan, which is data: the runtime is printed from it.
"""

from __future__ import annotations

from onegraph.ir.piece import SplitGraph
from onegraph.ir.plan import ExecutionPlan, PlanCall


def plan_calls(split: SplitGraph) -> ExecutionPlan:
    """One call for each piece; a value ends with the last call that uses it, unless it is a result."""
    last_use: dict[str, int] = {}
    for piece in split.pieces:
        for name in (*piece.outputs, *piece.inputs):
            last_use[name] = piece.index
    made = {name for piece in split.pieces for name in piece.outputs}
    kept = {name for name in split.results if isinstance(name, str)}
    calls = []
    for piece in split.pieces:
        ends = dict.fromkeys(n for n in (*piece.inputs, *piece.outputs) if last_use[n] == piece.index)
        frees = tuple(name for name in ends if name in made and name not in kept)
        comment = ", ".join(part for part in (piece.kind, piece.why or piece.module_path) if part)
        calls.append(PlanCall(piece.index, piece.inputs, piece.outputs, frees, comment))
    names = tuple(node.name for node in split.captured.graph_module.graph.find_nodes(op="placeholder"))
    return ExecutionPlan(names, tuple(calls), split.results)
