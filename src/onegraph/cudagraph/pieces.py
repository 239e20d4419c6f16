"""Recordings of the pieces of a graph, one for each, with what isn't recorded run between them.

A piece is recorded for one size of the first declared dim; one that has other sizes too isn't. What a recorded piece
takes lies at the same place in every call, or is copied there: results of splitting ops that have memory of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from onegraph.cudagraph.graph import RecordedGraph
from onegraph.ir.artifact import PieceCallable, PieceCode
from onegraph.ir.plan import ExecutionPlan, PlanCall
from onegraph.ir.recording import NotRecordableError, Recorder, Recording
from onegraph.ops.memory import clone_together
from onegraph.plan.function import input_function
from onegraph.plan.memory import Block, size_names, sizes_of


class ReplayedPiece:
    """A piece's callable that replays.

    `taken` are tensors that may come at another address: index, tensor, and whether the piece may write into it, so
    that what it has written is copied back for the pieces after it.
    """

    def __init__(self, recording: Recording, results: Any, taken: Iterable[tuple[int, torch.Tensor, bool]]) -> None:
        self._recording = recording
        self._results = results
        self._taken = [(index, tensor, tensor.data_ptr(), may_write) for index, tensor, may_write in taken]
        self.num_steps = len(recording.steps)
        self.num_bytes = recording.num_bytes

    def __call__(self, inputs: list[Any]) -> Any:
        written = []
        for index, static, address, may_write in self._taken:
            given = inputs[index]
            if given.data_ptr() != address:
                static.copy_(given)
                if may_write and 0 not in given.stride():  # nothing can be written into an expanded tensor
                    written.append((given, static))
        inputs.clear()
        self._recording.replay()
        for given, static in written:
            given.copy_(static)
        return self._results

    def poison(self) -> None:
        """As Recording.poison."""
        self._recording.poison()


@dataclass(frozen=True)
class RecordedPieces:
    """Callables for a plan's pieces, and why some of them aren't recorded."""

    pieces: list[PieceCallable]
    unrecorded: Mapping[int, str]


class PieceMemory:
    """Fixed places for the values of a graph's pieces, in one block that all sizes share."""

    def __init__(self, graph: RecordedGraph, region: int) -> None:
        pieces = graph.regions[region]
        reasons = ((call.piece, _reason(graph, call, pieces[call.piece])) for call in graph.plan.calls)
        self.why_not = {piece: why for piece, why in reasons if why is not None}
        """Why a piece can't be recorded."""
        self._pieces = [_Hidden(piece) if index in self.why_not else piece for index, piece in enumerate(pieces)]
        names = size_names(graph.plan, [self._pieces])
        self._block = None if names is None else Block(graph.plan, [self._pieces], names)
        self._sizes = input_function(graph.plan, names or ())

    def bound(self, inputs: Sequence[Any]) -> list[PieceCallable]:
        """The pieces for a call's sizes."""
        return list(self._pieces if self._block is None else self._block.bound(0, *self._sizes(*inputs)))

    @property
    def num_bytes(self) -> int:
        """As Block.num_bytes."""
        return 0 if self._block is None else self._block.num_bytes

    def poison(self) -> None:
        """As Block.poison."""
        if self._block is not None:
            self._block.poison()


def record_pieces(
    graph: RecordedGraph, memory: PieceMemory, inputs: Sequence[Any], recorder: Recorder
) -> tuple[RecordedPieces, list[Any]]:
    """Runs the plan once and records what can be; gives the results, too. Raises what the pieces raise.

    Raises NotRecordableError where nothing can be recorded.
    """
    plan, why = graph.plan, dict(memory.why_not)
    bound, values = memory.bound(inputs), dict(zip(plan.inputs, inputs, strict=True))
    fixed = {name for name, owner in zip(plan.inputs, graph.owners, strict=True) if owner in ("weight", "input")}
    for index, call in enumerate(plan.calls):
        args = [values[name] for name in call.inputs]
        if index in why:
            outputs = bound[index](args)
        else:
            changed = [one for name, one in zip(call.inputs, args, strict=True) if _may_change(plan, name)]
            before = clone_together([one for one in changed if isinstance(one, torch.Tensor)])
            try:
                tensors = [one for one in args if isinstance(one, torch.Tensor)]
                recording, outputs = recorder.record(partial(_called, bound[index], args), tensors)
            except NotRecordableError as error:  # and the piece has run up to there
                for tensor, values_before in zip(
                    (one for one in changed if isinstance(one, torch.Tensor)), before, strict=True
                ):
                    tensor.copy_(values_before)
                why[index] = f"{error.code}: {error.op} {error.why}"
                outputs = bound[index](args)
            else:
                taken = [
                    (i, one, _may_change(plan, name))
                    for i, (name, one) in enumerate(zip(call.inputs, args, strict=True))
                    if isinstance(one, torch.Tensor) and name not in fixed
                ]
                bound[index] = ReplayedPiece(recording, outputs, taken)
                fixed.update(call.outputs)
        values.update(zip(call.outputs, outputs, strict=True))
    if not any(isinstance(one, ReplayedPiece) for one in bound):
        index, reason = next(iter(why.items()))
        raise NotRecordableError("no_piece", f"piece {index}", f"isn't recordable ({reason}), and no other piece is")
    results = [values[one] if isinstance(one, str) else one for one in plan.results]
    return RecordedPieces(bound, why), results


def _may_change(plan: ExecutionPlan, name: str) -> bool:
    """Whether a piece may write into a value that it is given: another's, or an input that the graph writes."""
    return name in plan.written or name not in plan.inputs


def _called(piece: PieceCallable, inputs: list[Any]) -> Any:
    return piece(list(inputs))


class _Hidden:
    """A piece that takes no part in the plan of memory, since its sizes change between replays."""

    def __init__(self, piece: PieceCallable) -> None:
        self._piece = piece

    def __call__(self, inputs: list[Any]) -> Any:
        return self._piece(inputs)


def _reason(graph: RecordedGraph, call: PlanCall, piece: PieceCallable) -> str | None:
    """Why a piece isn't recorded, before it is tried."""
    if call.piece in graph.unrecordable:
        return graph.unrecordable[call.piece]
    if call.comment.startswith("splitting_op"):
        return "splitting_op: it runs between the recorded pieces"
    if call.has_data_sizes:
        return "data_sizes: its sizes follow from values"
    others = set(call.sizes.values())
    if isinstance(piece, PieceCode) and piece.prepared is not None:
        others |= {str(one) for one in sizes_of(graph.plan, call, piece.prepared)}
    others.discard(str(graph.plan.size))
    known = dict(zip(graph.plan.inputs, graph.names, strict=True))
    told = ", ".join(sorted(known.get(one, one) for one in others))
    return f"other_sizes: its sizes follow from {told} too" if others else None
