"""Pieces of onegraph's own ops alone, such as attention: their kernels are called as plain Python functions.

Takes a piece; gives a callable that calls the implementations that the dispatcher would pick, without the dispatcher,
and with memory for their results. While something listens at the dispatcher (a profiler, a dispatch mode), the ops go
through it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from onegraph.compilers import eager
from onegraph.compilers.wrapper import execute
from onegraph.ir.artifact import BufferUse, Layout, PieceCallable, PieceCode, PreparedPiece, SizeSource
from onegraph.ir.fx_nodes import value_of
from onegraph.ir.piece import Piece
from onegraph.ir.target import Target
from onegraph.ops.library import LIBRARY, implementation
from onegraph.torch_compat.operators import dispatcher_is_watched
from onegraph.torch_compat.shapes import is_plain_symbol


def compile_piece(piece: Piece, target: Target) -> PieceCode | None:
    """None for a piece that has other ops, or tensors of another device than the target's.

    The ops keep no reference to what they are given, and each result has memory of its own.
    """
    nodes = piece.graph_module.graph.nodes
    ops = {node: _own_op(node) for node in nodes if node.op not in ("placeholder", "output")}
    (output,) = piece.graph_module.graph.find_nodes(op="output")
    on_target = all(value.device.type == target.name for value in piece.fake_inputs if isinstance(value, torch.Tensor))
    if not on_target or not all(op or _is_row(node, ops) for node, op in ops.items()) or not _gives(output, ops):
        return None
    dispatched = eager.compile_piece(piece)
    functions = {f"__{op}": implementation(op, target.dispatch_key) for op in ops.values() if op is not None}
    if None in functions.values():
        return PieceCode(dispatched, frozenset())
    results = [node for node, op in ops.items() if op and isinstance(value_of(node), torch.Tensor)]
    namespace: dict[str, Any] = {**functions, "__dispatched": dispatched, "__is_watched": dispatcher_is_watched}
    execute(f"onegraph ops of piece {piece.index}", _source(piece.graph_module.graph, ops, results), namespace)
    run = namespace["run"]
    alone = functools.partial(run, (None,) * len(results))
    return PieceCode(alone, frozenset(), _prepared(output, ops, results, run))


def _source(graph: torch.fx.Graph, ops: dict[Node, str | None], results: list[Node]) -> str:
    """`run(results, args)`; a result is None where the op shall allocate."""
    inputs = [node.name for node in graph.nodes if node.op == "placeholder"]
    lines = ["def run(results, args):", "    if __is_watched():", "        return __dispatched(args)"]
    lines += [f"    {', '.join(inputs)}, = args", "    args.clear()"]
    for node, op in ops.items():
        if op is None:
            lines.append(f"    {node.name} = {_printed(node.args[0])}.unsqueeze(0)")
            continue
        given = [*map(_printed, node.args), *(f"{key}={_printed(one)}" for key, one in node.kwargs.items())]
        given += [f"out=results[{results.index(node)}]"] if node in results else []
        lines.append(f"    {node.name} = __{op}({', '.join(given)})")
    (output,) = graph.find_nodes(op="output")
    lines.append(f"    return [{', '.join(map(_printed, output.args[0]))}]")
    return "\n".join(lines) + "\n"


def _prepared(
    output: Node,
    ops: dict[Node, str | None],
    results: list[Node],
    run: Callable[..., Any],
) -> PreparedPiece | None:
    """None where a result's size is no plain size of the graph."""
    values = [value_of(node) for node in results]
    symbols = dict.fromkeys(str(size) for value in values for size in value.shape if not isinstance(size, int))
    if not all(isinstance(size, int) or is_plain_symbol(size) for value in values for size in value.shape):
        return None

    def layouts(*sizes: int) -> list[Layout]:
        known = dict(zip(symbols, sizes, strict=True))
        return [_contiguous([known.get(str(size), size) for size in value.shape], value.dtype) for value in values]

    def bind(scratch: Any, buffers: Sequence[torch.Tensor | None], sizes: Any, checks: bool) -> PieceCallable:
        return functools.partial(run, tuple(buffers))

    shown = [results.index(one if ops[one] else one.args[0]) for one in output.all_input_nodes]  # type: ignore[arg-type]
    return PreparedPiece(
        sizes=tuple(SizeSource(None, symbol) for symbol in symbols),
        size_names=tuple(symbols),
        scratch=(),
        results=tuple(
            BufferUse(node.name, f"{tuple(value.shape)}, contiguous, {value.dtype}", 0, 0)
            for node, value in zip(results, values, strict=True)
        ),
        outputs=tuple(shown),
        scratch_layouts=lambda *sizes: [],
        results_layouts=layouts,
        scratch_views=lambda buffers, *sizes: (),
        bind=bind,
    )


def _contiguous(shape: Sequence[int], dtype: torch.dtype) -> Layout:
    stride = [1]
    for length in reversed(shape[1:]):
        stride.append(stride[-1] * max(length, 1))
    return tuple(shape), tuple(reversed(stride)) if shape else (), dtype


def _own_op(node: Node) -> str | None:
    """The name of an op of ours that a node calls with plain values."""
    name = str(node.target).removesuffix(".default")
    values = (*node.args, *node.kwargs.values())
    if node.op != "call_function" or not name.startswith(f"{LIBRARY.ns}."):
        return None
    if not all(one is None or isinstance(one, Node | int | float | bool) for one in values):
        return None
    return name.removeprefix(f"{LIBRARY.ns}.")


def _is_row(node: Node, ops: dict[Node, str | None]) -> bool:
    """Whether it is `out[None]`, for what an op gave."""
    return node.target is operator.getitem and ops.get(node.args[0]) is not None and node.args[1] is None  # type: ignore[arg-type]


def _gives(output: Node, ops: dict[Node, str | None]) -> bool:
    """Whether the ops made all that is returned, each result for itself."""
    shown = [one if ops[one] else one.args[0] for one in output.all_input_nodes if one in ops]
    return len(shown) == len(output.args[0]) == len(set(shown))  # type: ignore[arg-type]


def _printed(value: object) -> str:
    return value.name if isinstance(value, Node) else repr(value)
