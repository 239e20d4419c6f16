"""The whole compile, in order: capture, split, compile or load each piece, bind. Only this file knows the order.

Takes a module, one example call and a resolved config; gives the entry that later calls run, and the records of
all stages as one Explanation.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from onegraph.binding import bind_weights
from onegraph.capture.capture import capture
from onegraph.capture.constraints import (
    ConstraintReport,
    judge,
    judge_region,
    refuse_narrowing,
    region_predicate,
)
from onegraph.capture.custom_ops import checked_at_first_call, custom_ops
from onegraph.capture.regions import MAX_REGIONS, UNBACKED, Sizing, next_sizes
from onegraph.capture.state_check import changed_entries, state_check
from onegraph.compiled import Built
from onegraph.config.resolve import ResolvedConfig
from onegraph.errors import ConfigError, ConstraintError, nearest
from onegraph.explanation import Explanation
from onegraph.ir.graph import CapturedGraph
from onegraph.ir.ledger import CheckedWhen, Ledger, ShapeEntry
from onegraph.ir.region import Region, general_region
from onegraph.ir.target import Target
from onegraph.piece_compiler import PieceCompiler
from onegraph.plan.function import failed_piece, plan_function, plan_source, region_finder
from onegraph.plan.plan import plan_calls
from onegraph.plan.slots import allocate_slots
from onegraph.specialised import Specialised, explained_pieces, parts_of, with_eager_piece
from onegraph.split.split import called_ops, missing_ops, split_graph
from onegraph.store.store import Store
from onegraph.torch_compat import dynamo, shapes
from onegraph.torch_compat.structured_trace import trace_json, trace_text


class Observer(Protocol):
    """Told when a stage begins, gets on and ends, for progress bars.

    `seconds` is None until the end; `detail` is how far it is, such as `2 of 3 pieces`.
    """

    def __call__(self, stage: str, seconds: float | None, detail: str = "") -> None: ...


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

    def progress(self, name: str, done: int, total: int) -> None:
        """Tells that a stage has done so many pieces."""
        if self.observer is not None:
            self.observer(name, None, f"{done} of {total} pieces")

    def totals(self) -> tuple[tuple[str, float], ...]:
        """Each stage once, with its seconds over all regions."""
        names = dict.fromkeys(name for name, _ in self.done)
        return tuple((name, sum(seconds for done, seconds in self.done if done == name)) for name in names)


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

        def specialise(sizing: Sizing) -> Specialised:
            with stages.stage("capture"):
                captured = capture(
                    module,
                    args,
                    kwargs,
                    dynamic_shapes=dynamic_shapes,
                    max_size=config.max_num_tokens,
                    required_alignment=target.required_alignment,
                    sizing=sizing,
                    split=config.on_constraint == "split",
                    state_is_checked=state_checked == "call" and not config.freeze,
                )
            return _specialise(captured, sizing, config, target, store, stages)

        made = _cover(specialise, config)
        checked: CheckedWhen = "never" if config.freeze else state_checked
        explanation = _explain(name, config, stages, made, checked)
        trace_json("explain", explanation.to_dict)
    entry = made[0].captured.bind_entry([(one.region.predicate, one.call) for one in made])
    reads = (read for one in made for read in one.captured.state if read.entry.checked == "call")
    state = tuple({(read.expression, read.condition): read for read in reads}.values())  # regions share most

    def fall_back(piece: int, why: str, size: int | None) -> Built:
        made[:] = with_eager_piece(made, piece, why, size)
        return replace(built, explanation=_explain(name, config, stages, made, checked))

    captured = made[0].captured
    slots = functools.partial(allocate_slots, captured.sized, captured.dims)
    built = Built(entry, explanation, fallback=fall_back, failed_piece=failed_piece, slots=slots)
    if config.freeze:
        return built
    built = replace(
        built,
        holds=state_check(state, lambda: all(one.weights.fit() for one in made)),
        changes=lambda: changed_entries(state) + tuple(change for one in made for change in one.weights.changes()),
    )
    return built


def _specialise(
    captured: CapturedGraph,
    sizing: Sizing,
    config: ResolvedConfig,
    target: Target,
    store: Store | None,
    stages: Stages,
) -> Specialised:
    """The stages after capture, for one region."""
    trace_text("captured_graph", lambda: captured.graph_module.print_readable(print_output=False))
    trace_json("ledger", captured.ledger.to_dict)
    region = general_region(captured.dims)
    if sizing.mode != "unbacked":
        hints = tuple((dim.name, sizing.size(dim, index)) for index, dim in enumerate(captured.dims))
        region = replace(region, hints=hints, predicate=region_predicate(captured.ledger.shapes, captured.fixed))

    with stages.stage("split"):
        _refuse_unknown_ops(captured, config)
        split = split_graph(captured, config.splitting_ops)

    def check_sizes(conditions: list[shapes.RawCondition], part: Region | None) -> tuple[ShapeEntry, ...]:
        known = {entry.expr for entry in captured.ledger.shapes}
        dims = captured.dims if part is None else part.dims(captured.dims)
        if sizing.mode == "unbacked":
            found = judge(conditions, dims, captured.symbols, "compile")
            refuse_narrowing(found, dims)
        else:
            may_split = config.on_constraint == "split"
            found = judge_region(conditions, dims, captured.symbols, "compile", may_split)
        return tuple(entry for entry in found if entry.expr not in known)

    plan = plan_calls(split)
    parts = parts_of(captured, region, plan, config)
    with stages.stage("compile or load"):
        compiler = PieceCompiler(config, target, store, check_sizes)
        pieces = compiler.compile_all(
            split.pieces, parts, region, captured.symbols, functools.partial(stages.progress, "compile or load")
        )

    with stages.stage("plan"):
        finder = region_finder([part.ranges[0][1:] for part in parts]) if len(parts) > 1 else None
        run = plan_function(plan, [[piece.call for piece in compiled] for compiled in pieces], finder)
        trace_text("execution_plan", lambda: plan_source(plan, len(parts)))

    with stages.stage("bind"):
        foreign = custom_ops(captured.graph_module)
        call = checked_at_first_call(run, captured.graph_module, foreign)
        mutates_inputs = any(piece.mutates_inputs for compiled in pieces for piece in compiled)
        weights = bind_weights(call, captured, mutates_inputs)
    made = Specialised(
        captured, region, split, plan, parts, pieces, run, weights, foreign, captured.make_callable(weights.run)
    )
    if sizing.mode == "unbacked":
        return made
    return replace(made, region=replace(region, predicate=region_predicate(made.constraints, captured.fixed)))


def _refuse_unknown_ops(captured: CapturedGraph, config: ResolvedConfig) -> None:
    """A splitting op that was asked for, and that the model never calls, would be ignored in silence."""
    asked = not config.why["splitting_ops"].startswith("level")
    for op in missing_ops(captured, config.splitting_ops) if asked else ():
        raise ConfigError(
            f"splitting_ops has {op!r}, and the model never calls it",
            where="splitting_ops",
            hint=nearest(op, called_ops(captured)),
        )


def _cover(specialise: Callable[[Sizing], Specialised], config: ResolvedConfig) -> list[Specialised]:
    """One region for all sizes; with backed sizes, or where a constraint may split the range, as many as it needs.

    Raises ConstraintError for a range that MAX_REGIONS, and those of the sizes 0 and 1, don't cover.
    """
    mode = config.dynamic_shapes
    if mode == "unbacked":
        try:
            return [specialise(UNBACKED)]
        except ConstraintError:
            if config.on_constraint != "split":
                raise
        mode = "backed"
    made: list[Specialised] = []
    sizes: tuple[tuple[str, int], ...] | None = ()
    tried, num_regions = sizes, 0
    while sizes is not None:
        if all(size >= 2 for _, size in sizes) and num_regions == MAX_REGIONS:
            _refuse_more_regions(made, sizes)
        if made and sizes == tried:
            _refuse_more_regions(made, sizes)  # the trace at these sizes isn't right for them
        tried = sizes
        num_regions += all(size >= 2 for _, size in sizes)
        made.append(specialise(Sizing(mode, sizes)))
        predicates = [one.region.predicate or "True" for one in made]
        sizes = next_sizes(made[0].captured.dims, predicates)
    return made


def _refuse_more_regions(made: list[Specialised], sizes: tuple[tuple[str, int], ...]) -> None:
    entries = tuple(entry for one in made for entry in one.captured.ledger.shapes if entry.effect == "split")
    unique = tuple({entry.expr: entry for entry in entries}.values())
    left = ", ".join(f"{name} = {size}" for name, size in sizes)
    raise ConstraintReport(unique, made[0].captured.dims, either=True, can_split=False).error(
        f"the model's conditions split the range into more than {MAX_REGIONS} regions ({left} is in none of them)"
    )


def _explain(
    name: str, config: ResolvedConfig, stages: Stages, made: list[Specialised], state_checked: CheckedWhen
) -> Explanation:
    first = made[0]
    shapes_found = {entry.expr: entry for one in made for entry in one.constraints}
    return Explanation(
        model=name,
        config=config.to_dict(),
        stages=stages.totals(),
        dims=first.captured.dims,
        ledger=replace(
            first.captured.ledger,
            shapes=tuple(shapes_found.values()),
            state=tuple(
                replace(entry, checked=state_checked) if entry.checked == "call" else entry
                for entry in dict.fromkeys(entry for one in made for entry in one.captured.ledger.state)
            ),
        ),
        pieces=explained_pieces(made),
        plan_source=plan_source(first.plan, len(first.parts)),
        num_ops=first.captured.num_ops,
        custom_ops=tuple(op for one in made for op in one.custom_ops),
        notes=tuple(
            dict.fromkeys(note for one in made for part in one.pieces for piece in part for note in piece.notes)
        ),
    )


def empty_explanation(name: str, config: ResolvedConfig) -> Explanation:
    """What can be said before the first call, or of a mode that compiles nothing of ours."""
    return Explanation(model=name, config=config.to_dict(), ledger=Ledger())
