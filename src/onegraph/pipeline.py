"""The whole compile, in order: capture, split, compile or load each piece, bind. Only this file knows the order.

Takes a module, one example call and a resolved config; gives the entry that later calls run, and the records of
all stages as one Explanation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from onegraph.binding import bind_weights
from onegraph.capture.capture import capture
from onegraph.capture.constraints import judge, refuse_narrowing
from onegraph.capture.custom_ops import checked_at_first_call, custom_ops
from onegraph.capture.state_check import changed_entries, state_check
from onegraph.compiled import Built
from onegraph.config.resolve import ResolvedConfig
from onegraph.explanation import Explanation, PieceExplanation
from onegraph.ir.artifact import CompiledPiece
from onegraph.ir.graph import CapturedGraph
from onegraph.ir.ledger import CheckedWhen, Ledger, ShapeEntry
from onegraph.ir.region import Region, general_region
from onegraph.ir.target import Target
from onegraph.piece_compiler import PieceCompiler
from onegraph.split.split import split_graph
from onegraph.store.store import Store
from onegraph.torch_compat import dynamo, shapes
from onegraph.torch_compat.structured_trace import trace_json, trace_text


class Observer(Protocol):
    """Told when a stage begins and ends, for progress bars; `seconds` is None at the beginning."""

    def __call__(self, stage: str, seconds: float | None) -> None: ...


@dataclass
class Stages:
    """The stages that ran, with their seconds, in order."""

    observer: Observer | None = None
    done: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        if self.observer is not None:
            self.observer(name, None)
        yield
        seconds = time.perf_counter() - started
        self.done.append((name, seconds))
        if self.observer is not None:
            self.observer(name, seconds)


def build(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    name: str,
    dynamic_shapes: Any,
    config: ResolvedConfig,
    target: Target,
    store: Store | None,
    observer: Observer | None = None,
    state_checked: CheckedWhen = "call",
) -> Built:
    """Compiles the module for all calls like the given one, at any size in the declared ranges.

    `state_checked` is when the result's `holds` will be called, for `explain`.
    `store` None means that nothing is read or written. Raises what the stages raise; a failed build leaves
    nothing behind but finished artifacts.
    """
    stages = Stages(observer)
    with dynamo.compile_scope("onegraph"):
        trace_json("config", config.to_dict)
        with stages.stage("capture"):
            captured = capture(
                module,
                args,
                kwargs,
                dynamic_shapes=dynamic_shapes,
                max_size=config.max_num_tokens,
                required_alignment=target.required_alignment,
            )
        trace_text("captured_graph", lambda: captured.graph_module.print_readable(print_output=False))
        trace_json("ledger", captured.ledger.to_dict)

        with stages.stage("split"):
            split = split_graph(captured)

        def check_sizes(conditions: list[shapes.RawCondition]) -> tuple[ShapeEntry, ...]:
            known = {entry.expr for entry in captured.ledger.shapes}
            found = judge(conditions, captured.dims, captured.symbols, "compile")
            refuse_narrowing(found, captured.dims)
            return tuple(entry for entry in found if entry.expr not in known)

        with stages.stage("compile or load"):
            region = general_region(captured.dims)
            compiler = PieceCompiler(config, target, store, check_sizes)
            compiled = [compiler.compile(piece, region) for piece in split.pieces]

        with stages.stage("bind"):
            foreign = custom_ops(captured.graph_module)
            call = checked_at_first_call(compiled[0].call, captured.graph_module, foreign)
            weights = bind_weights(call, captured, compiled[0].mutates_inputs)
            entry = captured.bind_entry(captured.make_callable(weights.run))

        checked: CheckedWhen = "never" if config.freeze else state_checked
        explanation = replace(_explain(name, config, stages, captured, compiled, region, checked), custom_ops=foreign)
        trace_json("explain", explanation.to_dict)
    if config.freeze:
        return Built(entry, explanation)
    return Built(
        entry,
        explanation,
        holds=state_check(captured.state, weights.fit),
        changes=lambda: changed_entries(captured.state) + weights.changes(),
    )


def _explain(
    name: str,
    config: ResolvedConfig,
    stages: Stages,
    captured: CapturedGraph,
    compiled: list[CompiledPiece],
    region: Region,
    state_checked: CheckedWhen,
) -> Explanation:
    shapes_found = captured.ledger.shapes + tuple(entry for piece in compiled for entry in piece.constraints)
    ranges = tuple((lower, upper) for _, lower, upper in region.ranges) or ((None, None),)
    return Explanation(
        model=name,
        config=config.to_dict(),
        stages=tuple(stages.done),
        dims=captured.dims,
        ledger=replace(
            captured.ledger,
            shapes=shapes_found,
            state=tuple(replace(entry, checked=state_checked) for entry in captured.ledger.state),
        ),
        pieces=tuple(
            PieceExplanation(
                index=index,
                kind="compiled",
                backend=piece.backend,
                key=piece.key,
                store=piece.store,
                why=piece.why,
                seconds=piece.seconds,
                ranges=ranges[:1],
            )
            for index, piece in enumerate(compiled)
        ),
        num_ops=captured.num_ops,
        notes=config.downgrades,
    )


def empty_explanation(name: str, config: ResolvedConfig) -> Explanation:
    """What can be said before the first call, or of a mode that compiles nothing of ours."""
    return Explanation(model=name, config=config.to_dict(), ledger=Ledger(), notes=config.downgrades)
