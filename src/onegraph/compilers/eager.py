"""The eager compiler: the captured graph as it is, op by op. Nothing is compiled and nothing is stored."""

from __future__ import annotations

from onegraph.ir.artifact import PieceCallable
from onegraph.ir.piece import Piece


def compile_piece(piece: Piece) -> PieceCallable:
    """The graph module's own forward."""
    forward = piece.graph_module.forward
    return lambda inputs: forward(*inputs)
