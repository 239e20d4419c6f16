"""The whole compile, in order: capture, split, compile or load each piece, bind. Only this file knows the order.

Takes a module, one example call and a resolved config; gives the entry that later calls run, and the records of
all stages as one Explanation. What the index has is taken before: see `build`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from onegraph.binding import bind_groups, bind_weights, group_indices, refuse_overlap
from onegraph.build_call import BuildCall
from onegraph.build_trace import (
    GraphTexts,
    told_why_refused,
    trace_build,
    trace_evaluation,
    trace_links,
    trace_process,
)
from onegraph.built import Built
from onegraph.capture.capture import capture
from onegraph.capture.constraints import (
    ConstraintReport,
    judge,
    judge_region,
    refuse_narrowing,
    region_predicate,
)
from onegraph.capture.custom_ops import checked_at_first_call, custom_ops
from onegraph.capture.origins import piece_origins
from onegraph.capture.portable import NotPortableError
from onegraph.capture.regions import MAX_REGIONS, UNBACKED, Sizing, next_sizes
from onegraph.config.resolve import ResolvedConfig
from onegraph.counters import counters
from onegraph.cudagraph.graph import RecordedGraph, recorded_graph
from onegraph.cudagraph.lint import called_lines, calling_line
from onegraph.cudagraph.recordings import Recordings
from onegraph.errors import ConfigError, ConstraintError, nearest
from onegraph.explanation import Explanation, IndexExplanation, explained_passes
from onegraph.ir.graph import CapturedGraph
from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.ledger import ShapeEntry
from onegraph.ir.passes import Fuel
from onegraph.ir.piece import SplitGraph
from onegraph.ir.plan import ExecutionPlan
from onegraph.ir.recording import Recorder
from onegraph.ir.region import Region, general_region
from onegraph.linear_kernels import linear_shapes
from onegraph.op_kernels import uses_own_ops
from onegraph.passes.catalogue import choose_passes, refuse_missed
from onegraph.passes.run import PassSettings, pass_settings, run_passes
from onegraph.pending import pending
from onegraph.piece_compiler import PieceCompiler
from onegraph.plan.buffers import buffer_plan
from onegraph.plan.function import failed_piece, function_source, plan_function, region_finder
from onegraph.plan.memory import size_names
from onegraph.plan.plan import plan_calls
from onegraph.plan.slots import allocate_slots
from onegraph.recording import recorded
from onegraph.saving import saving
from onegraph.specialised import Specialised, explained_pieces, parts_of, with_eager_piece
from onegraph.split.split import called_ops, missing_ops, split_graph
from onegraph.step_timing import CompiledGraph
from onegraph.store.index import Index, Miss
from onegraph.store.lookup import Lookup
from onegraph.store.unpacked import tell_edits
from onegraph.timeline import timeline
from onegraph.torch_compat import dynamo, shapes
from onegraph.torch_compat.structured_trace import trace_json
from onegraph.torch_compat.torch_logs import log_artifact


def trace_and_compile(call: BuildCall, key: Key | Unkeyable, miss: Miss | None) -> Built:
    """The build made anew, and kept in the index under `key`, if there is one. `miss` is what the index said."""
    why = key.reason if isinstance(key, Unkeyable) else str(miss or "")
    started = time.perf_counter()
    config, target, stages = call.config, call.target, call.stages
    chosen = choose_passes(config)
    rewriting = pass_settings(chosen.passes, config, target, Fuel(call.fuel))
    recorder = call.recorder()
    with dynamo.compile_scope("onegraph"), told_why_refused():
        trace_process(target, config.to_dict())
        if miss is not None and miss.reasons:
            trace_evaluation("refused", str(miss), sum(check.holds for check in miss.checks), miss.checks)
        log_artifact("recompiles", lambda: f"{call.name} is captured: {why}")

        def specialise(sizing: Sizing) -> Specialised:
            with stages.stage("capture"):
                captured = capture(
                    call.module,
                    call.args,
                    call.kwargs,
                    dynamic_shapes=call.dynamic_shapes,
                    max_size=config.max_num_tokens,
                    required_alignment=target.required_alignment,
                    sizing=sizing,
                    split=config.on_constraint == "split",
                    state_is_checked=call.state_checked == "call" and not config.freeze,
                )
            return _specialise(captured, sizing, call, rewriting, recorder)

        made = _cover(specialise, config)
        if call.store is not None:
            pieces = (one for each in made for part in each.pieces for one in enumerate(part))
            tell_edits(call.store.root, pieces, are_used=config.compile_cache_save_format == "unpacked")
        if call.fuel is None:  # else it may have run out before
            refuse_missed(chosen, (run for one in made for runs in one.passed.runs for run in runs))
        explanation, trace = _indexed(call, made, _explain(call, made), key, why, time.perf_counter() - started)
        for one in made:
            one.texts.split(one.plan, explanation.pieces)
        timeline.is_ready()
        trace_build(explanation, target, call.store)
    trace_links(explanation, call.store)
    if call.made_observer is not None:
        call.made_observer(made)
    call = replace(call, args=(), kwargs={})  # what is kept below doesn't keep the caller's tensors
    captured = made[0].captured
    entry = captured.bind_entry([(one.region.predicate, one.call) for one in made])

    def fall_back(piece: int, why: str, size: int | None) -> Built:
        made[:] = with_eager_piece(made, piece, why, size)
        fallen = replace(_explain(call, made), index=explanation.index)
        return replace(built, explanation=fallen)

    slots = functools.partial(allocate_slots, captured.sized, captured.dims)
    built = call.with_checks(
        Built(
            entry,
            explanation,
            fallback=fall_back,
            failed_piece=failed_piece,
            slots=slots,
            recordings=tuple(one.recordings for one in made if one.recordings is not None),
            graphs=tuple(
                CompiledGraph(
                    one.run, one.recordings, functools.partial(piece_origins, one.split.pieces, one.passed.pieces)
                )
                for one in made
            ),
            save=saving(call, trace, explanation, any(uses_own_ops(one.captured.graph_module) for one in made)),
        ),
        (read for one in made for read in one.captured.state),
        [one.weights for one in made],
    )
    return built


def _indexed(
    call: BuildCall, made: list[Specialised], explanation: Explanation, key: Key | Unkeyable, why: str, seconds: float
) -> tuple[Explanation, str | None]:
    """Keeps the build for later processes, under the key that is given.

    The explanation says why there was none, or why there will be none.
    """
    if call.store is None or isinstance(key, Unkeyable):
        return replace(explanation, index=IndexExplanation("off", why)), None
    with call.stages.stage("index"):
        try:
            contents = recorded(call, key.factors, made, explanation)
        except Exception as error:  # noqa: BLE001 - it looks at the user's objects; the build is right without a record
            why = str(error) if isinstance(error, NotPortableError) else f"{type(error).__name__}: {error}"
            index = IndexExplanation("off", f"the next start traces again: {why}")
            return replace(explanation, index=index), None
        if isinstance(call.store, Lookup):
            call.store.keep_trace(contents)
        trace = Index(call.store).keep(key.digest, contents, call.name, seconds)
        counters.add("traces_kept", int(trace is not None))
    return replace(explanation, index=IndexExplanation("miss", why), stages=call.stages.totals()), trace


def _specialise(
    captured: CapturedGraph, sizing: Sizing, call: BuildCall, rewriting: PassSettings, recorder: Recorder | None
) -> Specialised:
    """The stages after capture, for one region."""
    config, target, stages, owned = call.config, call.target, call.stages, call.owned
    region = general_region(captured.dims)
    if sizing.mode != "unbacked":
        hints = tuple((dim.name, sizing.size(dim, index)) for index, dim in enumerate(captured.dims))
        region = replace(region, hints=hints, predicate=region_predicate(captured.ledger.shapes, captured.fixed))
    texts = GraphTexts.of(region, captured.dims)
    texts.captured(captured.graph_module)
    trace_json("ledger", captured.ledger.to_dict)

    def observe(piece: int, name: str, graph_module: torch.fx.GraphModule) -> None:
        texts.passed(piece, name, graph_module)
        if call.pass_observer is not None:
            call.pass_observer(piece, name, graph_module)

    with stages.stage("split"):
        _refuse_unknown_ops(captured, config)
        split = split_graph(captured, config.splitting_ops)
    with stages.stage("passes"):
        names = (node.name for node in captured.graph_module.graph.find_nodes(op="placeholder"))
        weights_named = dict(zip(names, captured.weights, strict=False))
        rewriting = replace(rewriting, region=region, weights=weights_named, observer=observe)
        if owned is not None:
            rewriting = replace(rewriting, why_not=owned.survey(target.required_alignment).why_not)
        passed = run_passes(split, rewriting)

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

    plan = plan_calls(replace(split, pieces=passed.pieces), len(captured.weights), passed.merged)
    parts = parts_of(captured, region, plan, config)
    with stages.stage("compile or load"):
        compiler = PieceCompiler(config, target, call.store, check_sizes, texts)
        pieces = compiler.compile_all(
            passed.pieces, parts, region, captured.symbols, functools.partial(stages.progress, "compile or load")
        )

    with stages.stage("plan"):
        finder = region_finder([part.ranges[0][1:] for part in parts]) if len(parts) > 1 else None
        callables = [[piece.call for piece in compiled] for compiled in pieces]
        sizes = size_names(plan, callables) if config.plan_memory else None
        run = plan_function(plan, callables, finder, sizes)

    with stages.stage("bind"):
        foreign = custom_ops(captured.graph_module)
        further = slice(len(captured.weights), len(captured.weights) + len(passed.merged))
        recordings = None
        if recorder is not None:
            edited = {i for part in pieces for i, piece in enumerate(part) if piece.edited}
            graph = _recorded_graph(captured, split, plan, run, edited)
            recordings = Recordings.configured(graph, recorder, config)
        checked = checked_at_first_call(recordings or run, captured.graph_module, foreign, further)
        indices, groups = group_indices(captured, passed.merged), None
        if owned is not None and target.runs:
            groups = bind_groups(owned, captured.weights, indices, target.required_alignment)
        inputs = captured.fake_inputs[len(captured.weights) :]
        mutates_inputs = any(piece.mutates_inputs for compiled in pieces for piece in compiled)
        tensors = [i for i, fake in enumerate(inputs) if isinstance(fake, torch.Tensor) and mutates_inputs]
        refuse_overlap(captured, tensors)
        told = call.told_of_weights(recordings)
        weights = bind_weights(checked, captured.weights, captured.input_names, tensors, groups, told=told)
    made = Specialised(
        captured=captured,
        region=region,
        split=split,
        passed=passed,
        plan=plan,
        parts=parts,
        pieces=pieces,
        run=run,
        weights=weights,
        groups=indices,
        custom_ops=foreign,
        call=captured.make_callable(weights.run),
        texts=texts,
        recordings=recordings,
    )
    if sizing.mode == "unbacked":
        return made
    return replace(made, region=replace(region, predicate=region_predicate(made.constraints, captured.fixed)))


def _recorded_graph(
    captured: CapturedGraph, split: SplitGraph, plan: ExecutionPlan, run: Callable[..., Any], edited: Iterable[int]
) -> RecordedGraph:
    """What recordings know of the plan's function, which has `edited` pieces."""
    num_weights, inputs = len(captured.weights), captured.input_names
    merged = plan.inputs[num_weights : len(plan.inputs) - len(inputs)]
    return recorded_graph(
        plan,
        run,
        weights=(*(weight.name for weight in captured.weights), *merged),
        input_names=inputs,
        is_tensor=[isinstance(fake, torch.Tensor) for fake in captured.fake_inputs[num_weights:]],
        sized=captured.sized,
        unrecordable=dict.fromkeys(edited, "edited: somebody has edited its code"),
        user_line=lambda piece, op: calling_line(called_lines(split.pieces[piece]), op),
    )


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


def _explain(call: BuildCall, made: list[Specialised]) -> Explanation:
    config, state_checked = call.config, "never" if call.config.freeze else call.state_checked
    first = made[0]
    graphs = [piece.graph_module for one in made for piece in one.passed.pieces]
    shapes_found = {entry.expr: entry for one in made for entry in one.constraints}
    return Explanation(
        model=call.name,
        device=call.target.name,
        config=config.to_dict(),
        stages=call.stages.totals(),
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
        passes=explained_passes(run for runs in first.passed.runs for run in runs),
        plan_source=function_source(first.run),
        buffers=buffer_plan(first.plan, [piece.call for piece in first.pieces[-1]], first.captured)
        if config.plan_memory
        else None,
        num_ops=first.captured.num_ops,
        custom_ops=tuple(op for one in made for op in one.custom_ops),
        notes=tuple(
            dict.fromkeys(note for one in made for part in one.pieces for piece in part for note in piece.notes)
        ),
        pending=()
        if call.target.runs
        else pending(
            call.target,
            (merged for one in made for merged in one.passed.merged),
            (shape for graph in graphs for shape in linear_shapes(graph, call.target)),
            uses_own_ops=any(map(uses_own_ops, graphs)),
        ),
    )
