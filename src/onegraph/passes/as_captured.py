"""What a rewritten piece falls back to: the graph that it was before its passes, on the inputs that it takes now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onegraph.ir.artifact import PieceCallable
from onegraph.ir.piece import Piece
from onegraph.ir.weights import MergedWeight


def as_captured(captured: Piece, passed: Piece, merged: Sequence[MergedWeight]) -> PieceCallable:
    """Takes the inputs of `passed` and computes by the graph of `captured`, op by op.

    The rows of a merged weight are those of its sources. Where an input is gone, or an output is another value than
    it was (see `BorderPass`), the graph is that of `passed`.
    """
    places: dict[str, tuple[int, int | None, int]] = {name: (i, None, 0) for i, name in enumerate(passed.inputs)}
    known = dict(zip(captured.inputs, captured.fake_inputs, strict=True))
    for one in merged:
        at = 0
        for source in one.sources if one.name in places else ():
            length = known[source].shape[0]
            places.setdefault(source, (places[one.name][0], at, length))
            at += length
    if captured.outputs != passed.outputs or not all(name in places for name in captured.inputs):
        forward = passed.graph_module.forward
        return lambda inputs: forward(*inputs)
    forward, wanted = captured.graph_module.forward, [places[name] for name in captured.inputs]

    def run(inputs: list[Any]) -> Any:
        return forward(*(inputs[i] if at is None else inputs[i].narrow(0, at, length) for i, at, length in wanted))

    return run
