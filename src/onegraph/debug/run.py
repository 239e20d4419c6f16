"""One piece alone: compiled and eager on the same inputs, judged by fp64, output by output, and timed.

Eager is the piece as it was captured, before the passes, with onegraph's own ops as plain PyTorch: a wrong pass, a
wrong kernel and a wrong edit are all seen. The compiled piece runs twice, by the same code as in the model: in memory
that it allocates, and in planned memory, as from the second call of a size on.
"""

from __future__ import annotations

import bdb
import math
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from onegraph.compilers.loading import WRAPPER
from onegraph.debug.inputs import PieceInputs, copy_of
from onegraph.debug.pieces import ReachedPiece
from onegraph.ir.artifact import PieceCallable
from onegraph.ir.graph import FlatGraph
from onegraph.ir.piece import Piece
from onegraph.numerics.compare import Comparison, compare, uninitialised
from onegraph.ops.library import function_of
from onegraph.plan.function import plan_function
from onegraph.plan.memory import size_names
from onegraph.plan.plan import plan_calls
from onegraph.split.split import split_graph
from onegraph.torch_compat.op_modes import FilledMemory, InFloat64, Replaced

Around = Callable[[Callable[[], Any]], Any]
"""Calls what it is given, and gives its result: under a debugger, say."""

_FILLS = (1.0, -3.0)
_MOST_RUNS, _ENOUGH_S = 20, 0.5
"""Timing ends with so many runs, or after so many seconds."""


@dataclass(frozen=True)
class JudgedValue:
    """An output, or an input as the piece left it: `found` judges the first run, `planned` the one in planned memory.

    `planned` is None where nothing of the piece has a place in planned memory. `left_out` elements are memory that
    nobody has written, and aren't compared.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    found: Comparison
    planned: Comparison | None
    left_out: int

    @property
    def ok(self) -> bool:
        return self.found.ok and (self.planned is None or self.planned.ok)

    @property
    def where(self) -> str | None:
        """The worst place that isn't right."""
        if not self.found.ok or self.planned is None or self.planned.ok:
            return self.found.where
        return f"in planned memory alone: {self.planned.where}"

    @property
    def max_error(self) -> float:
        """Of both runs; infinite where a value is NaN that shouldn't be, or of another kind."""
        return max(self.found.max_error, 0.0 if self.planned is None else self.planned.max_error)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "max_error": self.max_error if math.isfinite(self.max_error) else None,
            "eager_error": self.found.eager_error,
            "ok": self.ok,
            "where": self.where,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class PieceRun:
    """What came of it: `raised` is what the compiled piece raised, with the line, and then there are no values.

    Seconds are medians.
    """

    values: tuple[JudgedValue, ...]
    raised: str | None
    compiled_s: float | None
    eager_s: float
    in_planned_memory: bool

    @property
    def ok(self) -> bool:
        return self.raised is None and all(one.ok for one in self.values)


def run_piece(reached: ReachedPiece, inputs: PieceInputs, around: Around = lambda run: run()) -> PieceRun:
    """Runs and compares. The first compiled run is that within `around`; what eager raises is raised."""
    compiled, is_planned = _as_planned(reached.piece, reached.compiled.call)
    eager = reached.eager
    with torch.inference_mode():
        try:
            found = _run(compiled, inputs, around)
            again = _run(compiled, inputs) if is_planned else None
            compiled_s = _seconds(compiled, inputs)
        except bdb.BdbQuit:
            raise  # somebody has left the debugger
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the user wants to see
            return PieceRun((), _told(error), None, _seconds(eager, inputs), is_planned)
        with Replaced(lambda op: function_of(op, "")):
            wanted = _run(eager, inputs)
            with InFloat64():
                truth = _run(eager, inputs)
            with FilledMemory(_FILLS[0]):
                filled = _run(eager, inputs)
            with FilledMemory(_FILLS[1]):
                masks = uninitialised(filled, _run(eager, inputs))
        written = (f"{inputs.names[index]}, as it leaves it" for index in sorted(inputs.written))
        names = dict(enumerate((*reached.piece.outputs, *written)))
        values = (
            JudgedValue(
                name=names.get(i, f"value {i}"),
                dtype=str(one.dtype).removeprefix("torch.") if isinstance(one, torch.Tensor) else type(one).__name__,
                shape=tuple(one.shape) if isinstance(one, torch.Tensor) else (),
                found=_judged(found[i : i + 1], one, truth[i], mask),
                planned=None if again is None else _judged(again[i : i + 1], one, truth[i], mask),
                left_out=0 if mask is None else int(mask.sum()),
            )
            for i, (one, mask) in enumerate(zip(wanted, masks, strict=True))
        )
        return PieceRun(tuple(values), None, compiled_s, _seconds(eager, inputs), is_planned)


def _as_planned(piece: Piece, call: PieceCallable) -> tuple[PieceCallable, bool]:
    """The piece as a plan's function of its inputs, as the model's plan calls it; whether its memory is planned.

    The first call of a size allocates, the next ones have their places.
    """
    whole = FlatGraph(piece.graph_module, piece.fake_inputs, piece.fake_mode, (), {})
    split = split_graph(whole, ())
    plan = plan_calls(split)
    sizes = size_names(plan, [[call]])
    if sizes is None or len(plan.results) != len(plan.calls[0].outputs):
        return call, False  # the same value twice, or a constant: the piece is called by itself
    run = plan_function(plan, [[call]], None, sizes)
    return lambda inputs: run(*inputs), True


def _run(call: PieceCallable, inputs: PieceInputs, around: Around = lambda run: run()) -> list[Any]:
    """The outputs, and the inputs that it writes as it leaves them, in memory of their own."""
    given = inputs.fresh()
    written = [given[index] for index in sorted(inputs.written)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = around(lambda: call(list(given)))
    return [copy_of(one) for one in (*outputs, *written)]


def _judged(found: Sequence[Any], eager: Any, truth: Any, mask: torch.Tensor | None) -> Comparison:
    one = compare(list(found), [eager], [truth], [mask if mask is not None and bool(mask.any()) else None])
    return one if one.where is None else replace(one, where=one.where.removeprefix("[0]"))


def _seconds(call: PieceCallable, inputs: PieceInputs) -> float:
    """The median of a call; what it writes is written again each time."""
    given, seconds = inputs.fresh(), list[float]()
    while len(seconds) < _MOST_RUNS and sum(seconds) < _ENOUGH_S:
        began = time.perf_counter()
        call(list(given))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _told(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((frame for frame in reversed(frames) if frame.filename.endswith(f"/{WRAPPER}")), frames[-1])
    return f"{type(error).__name__}: {str(error).strip()[:300]} (at {last.filename}:{last.lineno}: {last.line})"
