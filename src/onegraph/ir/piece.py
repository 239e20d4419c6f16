"""Pieces: the parts of a captured graph that are compiled, each on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from onegraph.ir.graph import FlatGraph


@dataclass(frozen=True)
class Piece:
    """One part of the graph. `graph_module` takes the placeholders of `fake_inputs` and returns a tuple.

    `inputs` and `outputs` are the names of the whole graph's values that come in and go out, in order; `why` says
    what made it a piece of its own, with the user's line; `module_path` is the module that its operations share.
    """

    index: int
    kind: Literal["compiled", "splitting_op"]
    graph_module: torch.fx.GraphModule
    fake_inputs: tuple[Any, ...]
    fake_mode: Any
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    why: str = ""
    module_path: str = ""
    eager_why: str | None = None
    """Why it must run op by op, whatever the backend; None for nearly all."""


@dataclass(frozen=True)
class SplitGraph:
    """The pieces in the order in which they run; together they compute what `whole` computes.

    `results` are the whole graph's outputs: the name of a value, or a constant that isn't a string.
    """

    whole: FlatGraph
    pieces: tuple[Piece, ...]
    results: tuple[Any, ...]
