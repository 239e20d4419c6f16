"""Plans a split graph: the calls in order, and after each one the values that are no longer needed.

Takes a SplitGraph. Gives an ExecutionPlan, which is data: the runtime is printed from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from onegraph.ir.fx_nodes import changed_arguments, storage_of, value_of
from onegraph.ir.graph import FlatGraph
from onegraph.ir.piece import Piece, SplitGraph
from onegraph.ir.plan import ExecutionPlan, PlanCall
from onegraph.ir.weights import MergedWeight
from onegraph.torch_compat import shapes

_UNKNOWN = "?"


def plan_calls(split: SplitGraph, num_weights: int = 0, merged: Sequence[MergedWeight] = ()) -> ExecutionPlan:
    """One call for each piece; a value ends with the last call that uses it, unless it is a result.

    The merged weights are further inputs, after the graph's own `num_weights` first ones.
    """
    names = tuple(node.name for node in split.whole.graph_module.graph.find_nodes(op="placeholder"))
    symbols = _symbols(split.whole, names)
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
        sizes, by_data = dict(_sizes(piece, symbols)), _has_data_sizes(piece, symbols)
        calls.append(PlanCall(piece.index, piece.inputs, piece.outputs, frees, comment, sizes, by_data))
    inputs = (*names[:num_weights], *(one.name for one in merged), *names[num_weights:])
    size = _size(split.whole, symbols)
    return ExecutionPlan(
        inputs,
        tuple(calls),
        split.results,
        size,
        symbols,
        frozenset(_written(split.whole)),
        tuple(
            _result_lengths(split, symbols if size is None else {**symbols, **dict.fromkeys(_first(split.whole), size)})
        ),
    )


def _result_lengths(split: SplitGraph, symbols: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """As ExecutionPlan.result_lengths. What isn't known, or follows from values, is no expression over the inputs."""
    values = {node.name: value_of(node) for node in split.whole.graph_module.graph.nodes}
    for result in split.results:
        value = values.get(result) if isinstance(result, str) else None
        if isinstance(value, torch.Tensor):
            yield tuple(_in_inputs(length, symbols) for length in value.shape)
        elif isinstance(value, torch.SymInt):
            yield (_in_inputs(value, symbols),)
        else:
            yield () if value is not None or not isinstance(result, str) else (_UNKNOWN,)


def _in_inputs(length: int | torch.SymInt, symbols: Mapping[str, str]) -> str:
    text = str(shapes.expression(length, None))
    return re.sub(r"\b[a-z]+\d+\b", lambda found: symbols.get(found[0], found[0]), text)


def _written(whole: FlatGraph) -> Iterator[str]:
    """The placeholders that show memory which a call of the graph may change in place."""
    graph = whole.graph_module.graph
    changed = {storage_of(one) for node in graph.nodes for one in changed_arguments(node)} - {None}
    yield from (node.name for node in graph.find_nodes(op="placeholder") if storage_of(node) in changed)


def _sizes(piece: Piece, symbols: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """As PlanCall.sizes."""
    for index, value in enumerate(piece.fake_inputs):
        lengths = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, length in lengths:
            if shapes.is_plain_symbol(length) and str(length) in symbols:
                yield str(index) if dim is None else f"{index}.shape[{dim}]", symbols[str(length)]


def _has_data_sizes(piece: Piece, symbols: Mapping[str, str]) -> bool:
    """As PlanCall.has_data_sizes."""
    lengths = (
        length for one in piece.fake_inputs for length in (one.shape if isinstance(one, torch.Tensor) else [one])
    )
    return any(not shapes.symbol_names(length) <= symbols.keys() for length in lengths)


def _symbols(whole: FlatGraph, names: tuple[str, ...]) -> dict[str, str]:
    """Where the inputs show the size that a symbol stands for: `u0`, or `x.shape[0]`."""
    found: dict[str, str] = {}
    for name, value in zip(names, whole.fake_inputs, strict=True):
        lengths = value.shape if isinstance(value, torch.Tensor) else [value]
        for index, length in enumerate(lengths):
            if shapes.is_plain_symbol(length):
                (symbol,) = shapes.symbol_names(length)
                shown = f"{name}.shape[{index}]" if isinstance(value, torch.Tensor) else name
                found[symbol] = min(shown, found.get(symbol, shown), key=len)
    return found


def _size(whole: FlatGraph, symbols: Mapping[str, str]) -> str | None:
    """The size of the first declared dim."""
    return min((symbols[symbol] for symbol in _first(whole) if symbol in symbols), key=len, default=None)


def _first(whole: FlatGraph) -> set[str]:
    """The symbols of the first declared dim, of which backed sizes have one for each argument."""
    return {symbol for symbol, dim in whole.symbols.items() if whole.dims and dim == whole.dims[0].name}
