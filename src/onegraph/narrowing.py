"""A piece made for fewer sizes: what of it is constant in a region is a constant of its graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onegraph.ir.piece import Piece
from onegraph.ir.region import Region
from onegraph.torch_compat import shapes
from onegraph.torch_compat.specialised_sizes import specialised_graph


def specialised_piece(piece: Piece, region: Region, general: Region, dims: Mapping[str, str]) -> Piece:
    """The piece for the region's sizes; the piece itself where it has none of the sizes that the region narrows.

    Raises NotSpecialisedError.
    """
    used = shapes.symbols_of(piece.fake_inputs, piece.fake_mode.shape_env)
    bounds = {name: (least, most) for name, least, most in region.ranges}
    narrowed = {name for name, least, most in general.ranges if bounds[name] != (least, most)}
    if not any(dims.get(symbol) in narrowed for symbol in used):
        return piece
    hints = dict(region.hints)
    ranges = {symbol: (*bounds[dims[symbol]], hints[dims[symbol]]) for symbol in used if dims.get(symbol) in bounds}
    made = specialised_graph(piece.graph_module, piece.fake_inputs, piece.fake_mode, ranges)
    return replace(piece, graph_module=made.graph_module, fake_inputs=made.fake_inputs, fake_mode=made.fake_mode)
