"""Pieces of onegraph's own ops alone, such as attention: their kernels are called as plain Python functions.

Takes a piece; gives a callable that calls the implementations that the dispatcher would pick, without the dispatcher,
and with memory for their results. While something listens at the dispatcher (a profiler, a dispatch mode), the ops go
through it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from onegraph.compilers import eager
from onegraph.compilers.wrapper import execute
from onegraph.ir.artifact import BufferUse, Layout, PieceCallable, PieceCode, PieceSource, PreparedPiece, SizeSource
from onegraph.ir.fx_nodes import value_of
from onegraph.ir.piece import Piece
from onegraph.ir.target import Target
from onegraph.ops.library import LIBRARY, implementation
from onegraph.torch_compat.operators import dispatcher_is_watched


@dataclass(frozen=True)
class OwnOps:
    """A piece of own ops as data. `source` is the text of `run(results, args)`, which calls `ops`.

    `results` are the tensors that they make, by name, with sizes as numbers or symbols, and dtype; `shown` is for each
    output the result that it shows. `is_planned` says that the results' sizes follow from plain symbols.
    """

    source: str
    ops: tuple[str, ...]
    results: tuple[tuple[str, tuple[int | str, ...], torch.dtype], ...]
    shown: tuple[int, ...]
    is_planned: bool


def compile_piece(piece: Piece, target: Target) -> PieceCode | None:
    """None for a piece that has other ops, or tensors of another device than the target's.

    The ops keep no reference to what they are given, and each result has memory of its own.
    """
    code = own_ops(piece, target)
    return None if code is None else load_piece(code, eager.compile_piece(piece), target, piece.index)


def own_ops(piece: Piece, target: Target) -> OwnOps | None:
    """As `compile_piece`, as data."""
    from onegraph.torch_compat.shapes import is_plain_symbol  # imports sympy, which loading doesn't need

    graph = piece.graph_module.graph
    ops = {node: _own_op(node) for node in graph.nodes if node.op not in ("placeholder", "output")}
    (output,) = graph.find_nodes(op="output")
    on_target = all(value.device.type == target.name for value in piece.fake_inputs if isinstance(value, torch.Tensor))
    if not on_target or not all(op or _is_row(node, ops) for node, op in ops.items()) or not _gives(output, ops):
        return None
    results = [node for node, op in ops.items() if op and isinstance(value_of(node), torch.Tensor)]
    shapes = [value_of(node).shape for node in results]
    return OwnOps(
        source=_source(graph, ops, results),
        ops=tuple(dict.fromkeys(op for op in ops.values() if op is not None)),
        results=tuple(
            (node.name, tuple(size if isinstance(size, int) else str(size) for size in shape), value_of(node).dtype)
            for node, shape in zip(results, shapes, strict=True)
        ),
        shown=tuple(results.index(one if ops[one] else one.args[0]) for one in output.all_input_nodes),  # type: ignore[arg-type]
        is_planned=all(isinstance(size, int) or is_plain_symbol(size) for shape in shapes for size in shape),
    )


def load_piece(code: OwnOps, dispatched: PieceCallable, target: Target, index: int) -> PieceCode:
    """The callable of a piece. `dispatched` runs it through the dispatcher."""
    functions = {f"__{op}": implementation(op, target.dispatch_key) for op in code.ops}
    if None in functions.values():
        return PieceCode(dispatched, frozenset())
    namespace: dict[str, Any] = {**functions, "__dispatched": dispatched, "__is_watched": dispatcher_is_watched}
    execute(f"onegraph ops of piece {index}", code.source, namespace)
    run = namespace["run"]
    alone = functools.partial(run, (None,) * len(code.results))
    source = PieceSource(code.source, namespace)
    return PieceCode(alone, frozenset(), _prepared(code, run) if code.is_planned else None, source)


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


def _prepared(code: OwnOps, run: Callable[..., Any]) -> PreparedPiece:
    symbols = tuple(dict.fromkeys(size for _, shape, _ in code.results for size in shape if isinstance(size, str)))

    def layouts(*sizes: int) -> list[Layout]:
        known = dict(zip(symbols, sizes, strict=True))
        return [
            _contiguous([size if isinstance(size, int) else known[size] for size in shape], dtype)
            for _, shape, dtype in code.results
        ]

    def bind(scratch: Any, buffers: Sequence[torch.Tensor | None], sizes: Any, checks: bool) -> PieceCallable:
        return functools.partial(run, tuple(buffers))

    return PreparedPiece(
        sizes=tuple(SizeSource(None, symbol) for symbol in symbols),
        size_names=symbols,
        scratch=(),
        results=tuple(
            BufferUse(name, f"({', '.join(map(str, shape))}), contiguous, {dtype}", 0, 0)
            for name, shape, dtype in code.results
        ),
        outputs=code.shown,
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
