"""The aot_eager compiler: AOTAutograd's functionalised and decomposed graph, run op by op. Nothing is stored."""

from __future__ import annotations

import copy

from onegraph.counters import counters
from onegraph.errors import CompileError
from onegraph.ir.artifact import PieceCallable
from onegraph.ir.piece import Piece
from onegraph.torch_compat import aot


def compile_piece(piece: Piece) -> tuple[PieceCallable, bool]:
    """The callable, and whether it changes inputs in place. Raises CompileError.

    Must run inside `torch_compat.dynamo.compile_scope`.
    """
    counters.add("aot_compiles")
    try:
        graph_module = copy.deepcopy(piece.graph_module)
        function, mutates_inputs = aot.compile_graph(graph_module, list(piece.fake_inputs), piece.fake_mode)
        return lambda inputs: function(*inputs), mutates_inputs
    except Exception as error:
        raise CompileError(
            f"AOTAutograd failed on piece {piece.index}: {type(error).__name__}: {str(error)[:600]}",
            where=f"piece {piece.index}",
            hint="-O.backend=eager runs the captured graph as it is; --verbose shows torch's traceback",
        ) from error
