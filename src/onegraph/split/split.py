"""Splits a captured graph into pieces. Without splitting ops the whole graph is one piece."""

from __future__ import annotations

from onegraph.ir.graph import CapturedGraph
from onegraph.ir.piece import Piece, SplitGraph


def split_graph(captured: CapturedGraph) -> SplitGraph:
    """One piece: the graph as it was captured, with weights and inputs as its inputs."""
    whole = Piece(
        index=0,
        kind="compiled",
        graph_module=captured.graph_module,
        fake_inputs=captured.fake_inputs,
        fake_mode=captured.fake_mode,
    )
    return SplitGraph(captured, (whole,))
