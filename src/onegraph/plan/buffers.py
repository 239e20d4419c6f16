"""The memory of one call as data, at example sizes: what `explain --plan` shows.

Takes a plan, the pieces' callables and the captured graph. Gives a BufferPlan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from onegraph.ir.artifact import PieceCallable, PreparedPiece
from onegraph.ir.graph import FlatGraph
from onegraph.ir.plan import BufferPlan, ExecutionPlan, PlannedBuffer
from onegraph.plan.memory import MemoryPlan, Places, num_bytes, place, plan_memory, size_names, sizes_of


def buffer_plan(plan: ExecutionPlan, pieces: Sequence[PieceCallable], captured: FlatGraph) -> BufferPlan | None:
    """Where everything lies at the largest declared sizes; None where nothing is planned, or a size has no bound."""
    names = size_names(plan, [pieces])
    sizes = None if names is None else largest_sizes(names, captured, plan)
    if sizes is None:
        return None
    memory = plan_memory(plan, pieces)
    found = place(plan, memory, sizes)
    buffers = (*_scratch(plan, memory, found), *_results(plan, memory, found))
    return BufferPlan(sizes, buffers, found.num_bytes, found.num_bytes_apart)


def _scratch(plan: ExecutionPlan, memory: MemoryPlan, found: Places) -> Iterator[PlannedBuffer]:
    """The buffers inside of each distinct piece, once."""
    for (piece, values), buffers in found.scratch.items():
        calls = [i for i, other in memory.prepared.items() if other is piece and found.values[i] == values]
        for use, (offset, layout) in zip(piece.scratch, buffers, strict=True):
            words = _in_words(plan, calls[0], piece, use.layout)
            yield PlannedBuffer((use.name,), words, calls[0], calls[-1], num_bytes(layout), offset)


def _results(plan: ExecutionPlan, memory: MemoryPlan, found: Places) -> Iterator[PlannedBuffer]:
    for result, offset, layout in found.results:
        piece = memory.prepared[result.call]
        words = _in_words(plan, result.call, piece, piece.results[result.result].layout)
        yield PlannedBuffer(result.names, words, result.call, result.last_call, num_bytes(layout), offset)


def _in_words(plan: ExecutionPlan, index: int, piece: PreparedPiece, layout: str) -> str:
    """The layout with the plan's expressions in the place of the piece's names."""
    known = dict(zip(piece.size_names, sizes_of(plan, plan.calls[index], piece), strict=True))
    return re.sub(r"\b[a-z]\w*\b", lambda found: str(known.get(found[0], found[0])), layout).replace("torch.", "")


def buffer_lines(plan: BufferPlan) -> list[str]:
    """A table for people."""
    at = ", ".join(f"{name} = {value}" for name, value in plan.sizes.items()) or "all sizes"
    lines = [
        f"memory of one call at {at}: {plan.num_bytes:,} bytes, reused by the next call "
        f"(its buffers beside each other would be {plan.num_bytes_apart:,})",
        f"  {'offset':>12} {'bytes':>12}  {'pieces':<10}values: size, stride, dtype",
    ]
    for one in plan.buffers:
        span = f"{one.first}..{one.last}" if one.last > one.first else f"{one.first}"
        lines.append(f"  {one.offset:>12,} {one.num_bytes:>12,}  {span:<10}{', '.join(one.names)}: {one.layout}")
    return lines


def largest_sizes(names: Sequence[str], captured: FlatGraph, plan: ExecutionPlan) -> dict[str, int] | None:
    """What the expressions `names` over the plan's inputs are at most; None where a dim isn't declared."""
    from onegraph.torch_compat.shapes import is_plain_symbol  # imports sympy, which showing a plan doesn't need

    names_in = (node.name for node in captured.graph_module.graph.find_nodes(op="placeholder"))
    inputs = dict(zip(names_in, captured.fake_inputs, strict=True))
    most = {dim.name: dim.max for dim in captured.dims}
    found: dict[str, int] = {}
    for name in names:
        size = eval(name, {}, dict(inputs))  # noqa: S307 - our own text
        if isinstance(size, int):
            found[name] = size
        elif is_plain_symbol(size) and captured.symbols.get(str(size)) in most:
            found[name] = most[captured.symbols[str(size)]]
        else:
            return None
    return found
