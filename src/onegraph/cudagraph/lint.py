"""Where in the user's code something is called that can't be recorded.

The lines of a piece are data, so that a build that was made in another process has them without its graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from onegraph.capture.custom_ops import user_line
from onegraph.ir.fx_nodes import called
from onegraph.ir.piece import Piece

_SPELLED = {"_local_scalar_dense": ("item", "tolist", "int", "float", "bool"), "native_dropout": ("dropout",)}
"""What the dispatcher calls otherwise than users do."""


def called_lines(piece: Piece) -> dict[str, str]:
    """`file:line` of the first call of each op in a piece, where it is known."""
    lines: dict[str, str] = {}
    for node in piece.graph_module.graph.nodes:
        name = called(node).rstrip("_")
        if name and name not in lines and (line := user_line(node)) is not None:
            lines[name] = line
    return lines


def calling_line(lines: Mapping[str, str], op: str) -> str | None:
    """The first call of an op (`aten.randn.default`) in a piece with these `called_lines`; None where none is known."""
    namespace, _, name = op.replace("::", ".").partition(".")
    name = name.partition(".")[0]
    wanted = {name.rstrip("_"), *_SPELLED.get(name, ())} if namespace == "aten" else {f"{namespace}::{name}"}
    return next((line for name, line in lines.items() if name in wanted), None)
