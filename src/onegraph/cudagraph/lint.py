"""Where in the user's code something is called that can't be recorded."""

from __future__ import annotations

from onegraph.capture.custom_ops import user_line
from onegraph.ir.fx_nodes import called
from onegraph.ir.piece import Piece

_SPELLED = {"_local_scalar_dense": ("item", "tolist", "int", "float", "bool"), "native_dropout": ("dropout",)}
"""What the dispatcher calls otherwise than users do."""


def calling_line(piece: Piece, op: str) -> str | None:
    """`file:line` of the first call of an op (`aten.randn.default`) in a piece; None where it isn't found."""
    namespace, _, name = op.replace("::", ".").partition(".")
    name = name.partition(".")[0]
    wanted = {name.rstrip("_"), *_SPELLED.get(name, ())} if namespace == "aten" else {f"{namespace}::{name}"}
    lines = (user_line(node) for node in piece.graph_module.graph.nodes if called(node).rstrip("_") in wanted)
    return next((line for line in lines if line is not None), None)
