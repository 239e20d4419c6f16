"""What is made of one captured graph: its pieces, compiled for each part of the sizes, and the function that runs them.

Parts are what `compile_sizes` and `compile_ranges` ask for, and the rest. Here a piece falls back to eager, and here it
is told which artifact serves which sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onegraph.binding import BoundWeights
from onegraph.build_trace import GraphTexts
from onegraph.capture.regions import covered_range
from onegraph.config.resolve import ResolvedConfig
from onegraph.cudagraph.recordings import Recordings
from onegraph.errors import ConfigError
from onegraph.explanation import PieceExplanation, RangeExplanation
from onegraph.ir.artifact import CompiledPiece
from onegraph.ir.custom_op import CustomOp
from onegraph.ir.dims import DynamicDim
from onegraph.ir.graph import CapturedGraph
from onegraph.ir.ledger import ShapeEntry
from onegraph.ir.piece import SplitGraph
from onegraph.ir.plan import ExecutionPlan
from onegraph.ir.region import Region, general_region, requested_regions
from onegraph.passes.as_captured import as_captured
from onegraph.passes.run import Passed
from onegraph.plan.function import replace_piece


@dataclass(frozen=True)
class Specialised:
    """What was made for one region: `call` takes the module's arguments, whose sizes the region must have."""

    captured: CapturedGraph
    region: Region
    """All the sizes that it is right for."""
    split: SplitGraph
    """The pieces as they were captured."""
    passed: Passed
    """The pieces after the passes."""
    plan: ExecutionPlan
    parts: tuple[Region, ...]
    """The sizes that have artifacts of their own; a size has that of the first part that it lies in."""
    pieces: tuple[tuple[CompiledPiece, ...], ...]
    """The pieces of each part."""
    run: Callable[..., Any]
    """The plan's function, of weights and inputs."""
    weights: BoundWeights
    groups: tuple[tuple[int, ...], ...]
    """The graph's weights that each merged one is made of, by their indices."""
    custom_ops: tuple[CustomOp, ...]
    call: Callable[..., Any]
    texts: GraphTexts
    recordings: Recordings | None = None
    """What stands before `run`, where calls may be recorded."""

    @property
    def constraints(self) -> tuple[ShapeEntry, ...]:
        """The conditions on sizes that the trace and the compiled pieces rely on."""
        compiled = (piece for pieces in self.pieces for piece in pieces)
        return self.captured.ledger.shapes + tuple(entry for piece in compiled for entry in piece.constraints)


def parts_of(
    captured: CapturedGraph, region: Region, plan: ExecutionPlan, config: ResolvedConfig
) -> tuple[Region, ...]:
    """The sizes of the region that get artifacts of their own, and the region itself where these leave any out."""
    dims = captured.dims
    *narrower, last = requested_regions(dims, config.compile_ranges, config.compile_sizes)
    if plan.size is None:
        return (region,)  # the first dim reaches nothing that is computed
    if last != general_region(dims):
        narrower.append(last)
    if region.predicate is not None:
        narrower = [one for one in narrower if covered_range(one.dims(dims), region.predicate)[0] is not None]
        return (*narrower, region)
    return tuple(narrower) if last != general_region(dims) else (*narrower, region)


def with_eager_piece(made: Sequence[Specialised], piece: int, why: str, size: int | None) -> list[Specialised]:
    """The same with one piece run op by op from the next call on: at all sizes, or in place of one size's artifact.

    Raises ConfigError for a piece that there isn't, and a size that isn't declared.
    """
    if size is not None:
        _refuse_undeclared(size, made[0].captured.dims)
    serving = [one for one in made if size is None or _serves(one, size)]
    most = max(len(one.split.pieces) for one in serving)
    if not 0 <= piece < most:
        raise ConfigError(f"there is no piece {piece}: the graph's pieces are 0..{most - 1}", where="fallback")
    return [
        _with_eager_one(one, piece, why, size) if one in serving and piece < len(one.split.pieces) else one
        for one in made
    ]


def _refuse_undeclared(size: int, dims: tuple[DynamicDim, ...]) -> None:
    if not dims or not dims[0].min <= size <= dims[0].max:
        declared = f"{dims[0].name} is declared as {dims[0].min}..{dims[0].max}" if dims else "no dim is dynamic"
        raise ConfigError(f"no artifact is for the size {size}: {declared}", where="fallback")


def _serves(one: Specialised, size: int) -> bool:
    """Whether a call with that size of the first dim may run this graph."""
    first, *others = one.captured.dims
    dims = (replace(first, min=size, max=size), *others)
    return one.region.predicate is None or covered_range(dims, one.region.predicate)[0] is not None


def _with_eager_one(one: Specialised, index: int, why: str, size: int | None) -> Specialised:
    regions = range(len(one.parts)) if size is None else [i for i, part in enumerate(one.parts) if part.has(size)][:1]
    call = as_captured(one.split.pieces[index], one.passed.pieces[index], one.passed.merged)
    replaced = CompiledPiece(call, "eager", "off", why, 0.0)
    pieces = list(one.pieces)
    for region in regions:
        replace_piece(one.run, region, index, replaced.call)
        pieces[region] = _without(pieces[region], index, replaced)
    if one.recordings is not None:
        one.recordings.forget()
    return replace(one, pieces=tuple(pieces))


def _without(pieces: tuple[CompiledPiece, ...], index: int, replaced: CompiledPiece) -> tuple[CompiledPiece, ...]:
    """With another piece at the index; those that shared the artifact of the old one still share it."""
    twins = [i for i, other in enumerate(pieces) if other.same_as == index]
    kept = [
        replace(other, same_as=twins[0] if i != twins[0] else None) if i in twins else other
        for i, other in enumerate(pieces)
    ]
    kept[index] = replaced
    return tuple(kept)


def explained_pieces(made: Sequence[Specialised]) -> tuple[PieceExplanation, ...]:
    """Each piece with its artifact for each region; regions may be cut into different numbers of pieces."""
    return tuple(_explained(made))


def _explained(made: Sequence[Specialised]) -> Iterator[PieceExplanation]:
    for index in range(max(len(one.split.pieces) for one in made)):
        ranges = [one for one in made if index < len(one.split.pieces)]
        piece, compiled = ranges[0].passed.pieces[index], ranges[0].pieces[0][index]
        runs = ranges[0].passed.runs[index]
        several = len(made) > 1 or len(ranges[0].parts) > 1
        yield PieceExplanation(
            index=index,
            kind=piece.kind,
            backend=next((b for one in ranges if (b := _backend(one, index)) != "eager"), "eager"),
            ranges=tuple(shown for one in ranges for shown in _ranges(one, index, several))
            if piece.kind == "compiled"
            else (),
            same_as=compiled.same_as,
            differs_from=compiled.differs_from,
            module_path=piece.module_path,
            why=piece.why,
            num_ops=sum(node.op.startswith("call_") for node in piece.graph_module.graph.nodes),
            passes={run.name: run.rewrites for run in runs if run.skipped is None},
        )


def _backend(one: Specialised, index: int) -> str:
    """What runs a piece, where that isn't eager for all sizes."""
    backends = (pieces[index].backend for pieces in one.pieces)
    return next((backend for backend in backends if backend != "eager"), "eager")


def _ranges(one: Specialised, index: int, several: bool) -> Iterator[RangeExplanation]:
    """The artifacts of a piece, each once with the sizes that it serves."""
    served: dict[int, list[int]] = {}
    for number, pieces in enumerate(one.pieces):
        served.setdefault(id(pieces[index].call), []).append(number)
    for numbers in served.values():
        parts = [one.region] if len(numbers) == len(one.parts) else [one.parts[number] for number in numbers]
        conditions = [part.condition(one.region) for part in parts]
        either = " or ".join(f"({one})" if len(parts) > 1 else f"{one}" for one in conditions)
        predicate = _both(one.region.predicate, None if None in conditions else either)
        bounds = [_bounds(one, part) for part in parts]
        piece = one.pieces[numbers[0]][index]
        yield RangeExplanation(
            min=min((least for least, _ in bounds if least is not None), default=None),
            max=max((most for _, most in bounds if most is not None), default=None),
            predicate=predicate if several and predicate else None,
            key=piece.key,
            store=piece.store,
            why=piece.why,
            seconds=piece.seconds,
            autotuned=piece.autotuned,
            edited=piece.edited,
        )


def _bounds(one: Specialised, part: Region) -> tuple[int | None, int | None]:
    """The least and the greatest size of the first dim in a part."""
    if one.region.predicate is not None:
        return covered_range(part.dims(one.captured.dims), one.region.predicate)
    return part.ranges[0][1:] if part.ranges else (None, None)


def _both(left: str | None, right: str | None) -> str | None:
    return " and ".join(f"({one})" if left and right else one for one in (left, right) if one) or None
