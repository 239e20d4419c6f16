"""Where the nodes of a piece's graph come from, as data that a build which another process made has without a graph."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from torch.fx import Node

from onegraph.capture.custom_ops import user_line
from onegraph.ir.fx_nodes import computed_nodes, module_path
from onegraph.ir.piece import Piece
from onegraph.ir.step_profile import NodeOrigin

PieceOrigins = tuple[NodeOrigin, ...]
"""Of the nodes of one piece that compute something, in order."""


def piece_origins(captured: Sequence[Piece], passed: Sequence[Piece]) -> tuple[PieceOrigins, ...]:
    """Those of each piece after the passes, which rewrite equal pieces once: then the graph has the first one's names.

    `captured` are the same pieces before them.
    """
    before = [computed_nodes(piece.graph_module.graph) for piece in captured]
    piece_of = {node.name: index for index, nodes in enumerate(before) for node in nodes}
    found = []
    for index, piece in enumerate(passed):
        nodes = computed_nodes(piece.graph_module.graph)
        pieces = Counter(piece_of[node.name] for node in nodes if node.name in piece_of)
        first = pieces.most_common(1)[0][0] if pieces else index
        found.append(tuple(_translated(nodes, before[first], before[index])))
    return tuple(found)


def _translated(nodes: Sequence[Node], first: Sequence[Node], own: Sequence[Node]) -> Iterator[NodeOrigin]:
    """The origins of nodes that were made of an equal piece's, as this piece has them."""
    pairs = list(zip(map(_origin, first), map(_origin, own), strict=False)) if len(first) == len(own) else []
    by_name = {there.name: here for there, here in pairs}
    users, paths = ({getattr(a, name): getattr(b, name) for a, b in pairs} for name in ("user", "module_path"))
    for node in map(_origin, nodes):
        made = NodeOrigin(node.name, users.get(node.user, node.user), paths.get(node.module_path, node.module_path))
        yield by_name.get(node.name, made)


def _origin(node: Node) -> NodeOrigin:
    return NodeOrigin(node.name, user_line(node), module_path(node))


def origins_to_bytes(origins: Iterable[PieceOrigins]) -> bytes:
    """The origins as a few bytes, which cost a start nothing but reading them."""
    rows = [[(one.name, one.user, one.module_path) for one in piece] for piece in origins]
    return zlib.compress(json.dumps(rows).encode())


def origins_from_bytes(contents: bytes) -> tuple[PieceOrigins, ...]:
    """What `origins_to_bytes` was given."""
    return tuple(tuple(NodeOrigin(*one) for one in piece) for piece in json.loads(zlib.decompress(contents)))
