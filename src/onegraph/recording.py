"""Makes the record of a build that was traced and compiled here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from onegraph.build_call import BuildCall
from onegraph.build_record import Asked, BuildRecord, PieceRecord, RegionRecord, not_loaded, portable_shapes
from onegraph.capture.origins import origins_to_bytes, piece_origins
from onegraph.capture.portable import NotPortableError, dumped
from onegraph.compilers import eager, own_ops
from onegraph.cudagraph.lint import called_lines
from onegraph.explanation import Explanation
from onegraph.ir.artifact import CompiledPiece
from onegraph.ir.target import Target
from onegraph.linear_kernels import linear_shapes
from onegraph.op_kernels import uses_own_ops
from onegraph.specialised import Specialised


def recorded(call: BuildCall, factors: dict[str, Any], made: Sequence[Specialised], explanation: Explanation) -> bytes:
    """The build's bytes. Raises NotPortableError for one that another process can't take for its own."""
    target = call.target
    if explanation.custom_ops:
        raise NotPortableError(f"what {explanation.custom_ops[0].name} does is known after a call alone")
    graphs = [piece.graph_module for one in made for piece in one.passed.pieces]
    asked = Asked(
        portable_shapes(call.dynamic_shapes), call.given, call.state_checked == "event", call.owned is not None
    )
    return dumped(
        BuildRecord(
            asked=asked,
            factors=factors,
            regions=tuple(_region_record(one, target) for one in made),
            explanation=explanation,
            uses_own_ops=any(map(uses_own_ops, graphs)),
            linears=tuple(dict.fromkeys(shape for graph in graphs for shape in linear_shapes(graph, target))),
        )
    )


def _region_record(one: Specialised, target: Target) -> RegionRecord:
    return RegionRecord(
        trace=one.captured.record(one.captured),
        region=one.region,
        parts=one.parts,
        plan=one.plan,
        merged=one.passed.merged,
        groups=one.groups,
        pieces=tuple(tuple(_piece_records(one, pieces, target)) for pieces in one.pieces),
        texts=one.texts.packed,
        lines=tuple(map(called_lines, one.split.pieces)),
        origins=origins_to_bytes(piece_origins(one.split.pieces, one.passed.pieces)),
    )


def _piece_records(one: Specialised, pieces: tuple[CompiledPiece, ...], target: Target) -> Iterable[PieceRecord]:
    for piece, compiled in zip(one.passed.pieces, pieces, strict=True):
        facts = replace(compiled, call=not_loaded)
        if compiled.autotuned:
            raise NotPortableError("which kernels it has is chosen by records that may be edited")
        if compiled.same_as is not None:
            yield PieceRecord(facts)
        elif compiled.backend == "inductor" and compiled.key is not None and compiled.store != "off":
            yield PieceRecord(facts, key=compiled.key)
        elif compiled.backend == "eager":
            code = eager.eager_code(piece)
            if code is None:
                raise NotPortableError(f"piece {piece.index} runs op by op, and needs objects of this process")
            ops = own_ops.own_ops(piece, target) if piece.kind == "splitting_op" else None
            yield PieceRecord(facts, ops=ops, code=code)
        else:
            raise NotPortableError(f"piece {piece.index} isn't kept: {compiled.why}")
