"""From a configuration to an engine that is ready: load the weights, size the cache, compile, assemble.

Takes: an `EngineConfig`. Gives: a `Started` with the engine, the loaded and the compiled model, and what each
stage took. This is the one place where an engine's model is compiled; `ahead_of_time` does it without starting one.
"""

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onegraph import api
from onegraph.build_trace import trace_explanation, trace_process
from onegraph.compiled import CompiledModel
from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.engine import EngineConfig
from onegraph.config.resolve import OF_RECORDINGS, is_asked
from onegraph.cudagraph.sizes import SizeChoice
from onegraph.engine.assemble import assemble_engine
from onegraph.engine.engine import Engine
from onegraph.engine.kv_cache import LayerKV
from onegraph.engine.limits import Limits, resolve_limits
from onegraph.engine.progress import Progress, bar
from onegraph.engine.recorded_batches import RecordedBatches, shown_padding, why_unrecordable
from onegraph.engine.text import Text
from onegraph.explanation import Explanation
from onegraph.garbage import collected_later
from onegraph.ir.recording import RecordingPlan
from onegraph.ir.target import Target
from onegraph.log import get_logger
from onegraph.models import BUILTIN_MODEL, LoadedModel, load_model
from onegraph.op_kernels import OpKernels, install_op_kernels, op_kernels_begun
from onegraph.store.lookup import Lookup
from onegraph.targets import describe_target, resolve_device, target_for
from onegraph.timeline import timeline
from onegraph.torch_compat.structured_trace import latest_compile, trace_is_written, written_for

log = get_logger(__name__)

WARM_UP_TOKENS = 16
"""Rows of the example that the model is captured on; any number would do, since sizes never reach the compiler."""

WORTH_RECORDING = 8
"""So often a batch has to come until it is recorded without having been asked for: a recording takes as long as it
saves in about so many replays (`bench/results` has both)."""

NOT_ASKED = OpKernels(True, "off", "not asked for", 0.0)


@dataclass(frozen=True, slots=True)
class Started:
    """A ready engine and what it was made of; `target` is what its model was compiled for.

    `load_s` and `compile_s` are the seconds of the two stages.
    """

    engine: Engine
    model: LoadedModel
    compiled: CompiledModel
    op_kernels: OpKernels
    limits: Limits
    config: EngineConfig
    target: Target
    load_s: float
    compile_s: float
    recording_plan: RecordingPlan | None = None
    """The batches that are recorded, or will be when they first come; None where none are."""

    def explain(self) -> Explanation:
        """How the model was compiled, for which device, and what its attention was lowered to."""
        explanation = self.compiled.explain()
        plan, why_not = self.recording_plan, self.engine.unrecordable
        if plan is not None:
            plan = None if why_not is not None else replace(plan, traffic=self.engine.traffic or plan.traffic)
        more = [] if why_not is None else [f"nothing is recorded: {why_not}"]
        inputs, padded = shown_padding(explanation.recorded_inputs, {} if plan is None else plan.sizes)
        return replace(
            explanation,
            device=describe_target(self.target),
            notes=tuple(dict.fromkeys((*explanation.notes, *self.op_kernels.notes, *more))),
            recording_plan=plan,
            recorded_inputs=inputs,
            padded=padded,
            uncovered=() if plan is None else plan.uncovered,
        )

    def trace(self, compile_id: Any) -> None:
        """Writes into torch's trace what is known of it now, as of the compile that it was made in."""
        with written_for(compile_id):
            trace_process(self.target, self.compiled.explain().config)
            trace_explanation(self.explain())


@collected_later()
def start_engine(
    config: EngineConfig, lookup: Lookup | None = None, made_observer: Callable[[Sequence[Any]], None] | None = None
) -> Started:
    """Loads, compiles (or loads what was compiled before) and assembles; shows bars where stderr is a terminal.

    With a `lookup` nothing is compiled: it is asked what it has, and `explain` of what is made here tells. A
    `made_observer` is told the pieces (see `BuildCall`), and nothing is recorded.

    Errors: ConfigError, ModelError, and what compiling raises.
    """
    began = time.perf_counter()
    device = resolve_device(config.device)
    saved = None if config.artifact is None else api.open_saved(Path(config.artifact))
    target = target_for(device) if saved is None else saved.target(device)  # refuses before weights are read
    with bar("weights", 3) as progress, timeline.stage("weights"):
        model = load_model(
            config.model or BUILTIN_MODEL,
            dtype=config.dtype,
            device=device,
            trust_remote_code=config.trust_remote_code,
            progress=progress,
        )
    store = lookup or (api.open_store() if saved is None else saved.store)
    layers = layers_of(model)
    limits = resolve_limits(
        config, model_len=model.max_model_len, layers=layers, available_bytes=target.available_bytes
    )
    loaded = time.perf_counter()
    begun = op_kernels_begun(target, store) if lookup is None else nullcontext()
    with bar("compile", 6) as progress, begun:
        compiled, engine = compiled_engine(
            config,
            model,
            layers,
            limits,
            target,
            progress,
            lookup=lookup,
            saved=saved,
            made_observer=made_observer,
        )
        progress("attention kernel")
        op_kernels = NOT_ASKED if lookup is not None else install_op_kernels(target, store)
        is_watched = lookup is not None or made_observer is not None
        with timeline.stage("record"):
            plan = None if is_watched else _record(compiled, engine, limits, progress)
    compile_s = time.perf_counter() - loaded
    started = Started(
        engine, model, compiled, op_kernels, limits, config, target, loaded - began, compile_s, recording_plan=plan
    )
    timeline.is_ready()
    if trace_is_written():
        trace = functools.partial(started.trace, latest_compile())
        trace()
        engine.tell_recorded(trace)
    return started


def _record(compiled: CompiledModel, engine: Engine, limits: Limits, progress: Progress) -> RecordingPlan | None:
    """Plans which batches are recorded, tells, and records them; None where nothing is recorded.

    Raises ConfigError for sizes that can't be, and RecordingError for what can't be recorded, where it was asked for.
    """
    settings = compiled.explain().config
    mode = CUDAGraphMode[settings["cudagraph_mode"]["value"]]
    if mode is CUDAGraphMode.NONE:
        return None
    choice, lazy = SizeChoice.of(settings), settings["cudagraph_lazy"]
    lazily_at = None if not lazy["value"] else 1 if is_asked(lazy["why"]) else WORTH_RECORDING
    planned = functools.partial(
        RecordedBatches.planned,
        mode,
        max_num_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_blocks=limits.max_blocks_per_seq,
    )
    batches, first = planned(replace(choice, budget_bytes=None)), None
    if_it_can = not any(is_asked(settings[name]["why"]) for name in ("cudagraph_mode", *OF_RECORDINGS))
    if choice.needs_estimate or lazily_at is None:
        try:
            first = engine.record_largest(batches)
        except Exception as error:
            if not if_it_can:
                raise
            engine.record_nothing(why_unrecordable(error))
            return None
        batches = planned(choice, bytes_per_row=first.bytes_per_row)
    plan = batches.plan(choice, lazily_at=lazily_at, first=first, max_num_tokens=limits.max_num_batched_tokens)
    log.info("recordings: %s", "; ".join(plan.lines()))
    engine.record(
        batches,
        lambda done, total: progress("record", f"{done} of {total} sizes"),
        lazily_at=lazily_at,
        if_it_can=if_it_can,
    )
    return plan


def layers_of(model: LoadedModel) -> list[LayerKV]:
    """What each layer of a model keeps of a token."""
    return [LayerKV(model.kv.num_kv_heads, model.kv.head_dim, model.kv.dtype)] * model.kv.num_layers


def compiled_engine(
    config: EngineConfig,
    model: LoadedModel,
    layers: Sequence[LayerKV],
    limits: Limits,
    target: Target,
    progress: Progress,
    *,
    lookup: Lookup | None = None,
    saved: api.Saved | None = None,
    made_observer: Callable[[Sequence[Any]], None] | None = None,
) -> tuple[CompiledModel, Engine]:
    """The model compiled for the calls of an engine, and that engine. Raises what compiling raises."""
    compiled = api.compiled_model(
        model.module,
        dynamic_shapes=model.module.dynamic_shapes(
            limits.max_num_batched_tokens, limits.max_num_seqs, limits.compiled_blocks_per_seq, len(layers)
        ),
        config=config.compilation_config,
        enforce_eager=config.enforce_eager,
        name=model.name,
        own_module=True,
        own_weights=True,
        observer=lambda stage, seconds, detail="": progress(stage, detail) if seconds is None else None,
        lookup=lookup,
        saved=saved,
        target=target,
        records_by_hand=True,
        made_observer=made_observer,
    )
    engine = assemble_engine(
        compiled,
        layers=layers,
        limits=limits,
        text=Text(model.tokenizer),
        vocab_size=vocab_size(model.config),
        eos_token_ids=eos_token_ids(model),
        target=target,
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
    )
    engine.warm_up(min(WARM_UP_TOKENS, limits.max_num_batched_tokens))
    return compiled, engine


def vocab_size(config: Any) -> int:
    """Rows of the model's embedding, which may be more than its tokenizer's tokens."""
    return int(config.get_text_config().vocab_size)


def eos_token_ids(model: LoadedModel) -> frozenset[int]:
    """The tokens that end a text, from the first place that names them, as transformers' `generate` does.

    The places: the generation config, the model's config, the tokenizer.
    """
    for source in (model.generation_config, model.config.get_text_config(), model.tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
