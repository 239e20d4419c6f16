"""FlatGraph: a graph to split and compile. CapturedGraph: a module's whole graph, and all that it assumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.ir.dims import DynamicDim, SizedArgument
from onegraph.ir.ledger import Ledger, StateRead

GraphCallable = Callable[..., Any]
"""Takes a graph's placeholders, flat; returns its outputs as a tuple or list."""


@dataclass(frozen=True)
class WeightInput:
    """A tensor that the module owns, or that a closure holds, and that the graph reads as an input.

    `name` is the qualified name in the module (`layers.0.weight`) or Dynamo's name for a free tensor;
    `holder[key]` is the tensor that stands at that place now.
    """

    name: str
    holder: Any
    key: Any


@dataclass(frozen=True)
class FlatGraph:
    """A graph that takes tensors and sizes as placeholders, and returns a flat tuple.

    `fake_inputs` are their symbolic values, one for each placeholder, in `fake_mode`. `symbols` are those of the
    declared `dims`, where there are any.
    """

    graph_module: torch.fx.GraphModule
    fake_inputs: tuple[Any, ...]
    fake_mode: Any
    dims: tuple[DynamicDim, ...]
    symbols: dict[str, str]
    """Symbol of torch (`u0`) -> name of the declared dim."""


@dataclass(frozen=True)
class CapturedGraph(FlatGraph):
    """The result of capture.

    `graph_module` takes the weights first and then the inputs that Dynamo found (sizes as ints, tensors).
    `make_callable(run)` gives a function with the signature of the traced
    function (with its `self`) that calls `run(*inputs)` and then redoes the function's Python effects and
    rebuilds its result; it has no Dynamo in it. `bind_entry(calls)` puts the checks of the input contract in
    front of such functions, each with the predicate of the sizes that it is for, or None for all.
    """

    weights: tuple[WeightInput, ...]
    input_names: tuple[str, ...]
    sized: tuple[SizedArgument, ...]
    """The arguments that the declared dims belong to."""
    ledger: Ledger
    state: tuple[StateRead, ...]
    """How the ledger's entries of Python state are checked."""
    make_callable: Callable[[Callable[..., Any]], Callable[..., Any]]
    bind_entry: Callable[[Sequence[tuple[str | None, Callable[..., Any]]]], Callable[..., Any]]
    record: Callable[[CapturedGraph], Any]
    """Gives the trace as data for other processes, a `capture.trace_record.TraceRecord`; raises NotPortableError."""
    fixed: Mapping[str, int]
    """Declared dims that this graph has as constants."""
    num_ops: int
