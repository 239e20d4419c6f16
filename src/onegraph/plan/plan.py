"""Plans a split graph: the calls in order, and after each one the values that are no longer needed.

Takes a SplitGraph. Gives an ExecutionPlan, which is data: the runtime is printed from it.
"""

from __future__ import annotations

import torch

from onegraph.ir.graph import FlatGraph
from onegraph.ir.piece import SplitGraph
from onegraph.ir.plan import ExecutionPlan, PlanCall
from onegraph.torch_compat import shapes


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
    names = tuple(node.name for node in split.whole.graph_module.graph.find_nodes(op="placeholder"))
    return ExecutionPlan(names, tuple(calls), split.results, _size(split.whole, names))


def _size(whole: FlatGraph, names: tuple[str, ...]) -> str | None:
    """Where the inputs show the size of the first declared dim."""
    first = {symbol for symbol, dim in whole.symbols.items() if whole.dims and dim == whole.dims[0].name}
    found = []
    for name, value in zip(names, whole.fake_inputs, strict=True):
        lengths = value.shape if isinstance(value, torch.Tensor) else [value]
        for index, length in enumerate(lengths):
            if shapes.is_plain_symbol(length) and shapes.symbol_names(length) <= first:
                found.append(f"{name}.shape[{index}]" if isinstance(value, torch.Tensor) else name)
    return min(found, key=len, default=None)
