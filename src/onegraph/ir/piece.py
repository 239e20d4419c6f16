"""Pieces: the parts of a captured graph that are compiled, each on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from onegraph.ir.graph import CapturedGraph


@dataclass(frozen=True)
class Piece:
    """One part of the graph. `graph_module` takes the placeholders of `fake_inputs` and returns a tuple."""

    index: int
    kind: Literal["compiled", "splitting_op"]
    graph_module: torch.fx.GraphModule
    fake_inputs: tuple[Any, ...]
    fake_mode: Any


@dataclass(frozen=True)
class SplitGraph:
    """The pieces in the order in which they run; together they compute what `captured` computes."""

    captured: CapturedGraph
    pieces: tuple[Piece, ...]
