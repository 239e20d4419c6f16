"""One graph of torch.compile's, compiled and stored: the part of the pipeline that runs below Dynamo.

Takes the graph module and inputs that Dynamo hands to a backend; splits and compiles as with a captured graph. What
compiling assumes about sizes becomes Dynamo's guards, on a warm start as on a cold one; there is no declared range
and no ledger here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from onegraph.build_trace import GraphTexts, trace_process, trace_timeline
from onegraph.capture.custom_ops import checked_at_first_call, custom_ops
from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.resolve import ResolvedConfig
from onegraph.cudagraph.graph import RecordedGraph, recorded_graph
from onegraph.cudagraph.lint import called_lines, calling_line
from onegraph.cudagraph.recordings import Recordings
from onegraph.errors import ConfigError, nearest
from onegraph.ir.graph import FlatGraph
from onegraph.ir.piece import SplitGraph
from onegraph.ir.plan import ExecutionPlan
from onegraph.passes.catalogue import choose_passes
from onegraph.passes.run import pass_settings, run_passes
from onegraph.piece_compiler import PieceCompiler
from onegraph.plan.function import plan_function
from onegraph.plan.memory import size_names
from onegraph.plan.plan import plan_calls
from onegraph.split.split import called_ops, missing_ops, split_graph
from onegraph.store.store import Store
from onegraph.store.unpacked import tell_edits
from onegraph.targets import common_device, target_for
from onegraph.torch_compat import dynamo

_OF_SIZES = (
    *("compile_sizes", "compile_ranges", "cudagraph_capture_sizes", "cudagraph_traffic"),
    *("cudagraph_memory_mib", "cudagraph_lazy", "cudagraph_padding"),
)
"""Settings that are about declared sizes."""


def compile_dynamo_graph(
    graph_module: torch.fx.GraphModule, example_inputs: list[Any], config: ResolvedConfig, store: Store | None
) -> Callable[..., Any]:
    """A callable of the graph's inputs; with a cudagraph mode, its first call is recorded.

    Raises ConfigError if a gradient is needed, CompileError, and RecordingError at the first call.
    """
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise ConfigError(
            "torch.compile(backend='onegraph') is for inference, and this call needs gradients",
            hint="call under torch.no_grad() or torch.inference_mode()",
        )
    _refuse_what_needs_a_range(config)
    dynamo.make_floats_constant()
    fakes = tuple(n.meta["example_value"] for n in graph_module.graph.find_nodes(op="placeholder"))
    device = common_device(value.device.type for value in fakes if isinstance(value, torch.Tensor))
    foreign = custom_ops(graph_module)
    target = target_for(device)
    whole = FlatGraph(graph_module, fakes, dynamo.current_fake_mode(), dims=(), symbols={})
    _refuse_unknown_ops(whole, config)
    texts = GraphTexts(None)
    compiler = PieceCompiler(config, target, store, lambda conditions, region: (), texts)
    rewriting = pass_settings(choose_passes(config).passes, config, target, observer=texts.passed)
    trace_process(target, config.to_dict())
    texts.captured(graph_module)
    with dynamo.COMPILE_LOCK:
        split = split_graph(whole, config.splitting_ops)
        split = replace(split, pieces=run_passes(split, rewriting).pieces)
        (pieces,) = compiler.compile_all(split.pieces, (None,), None, {}, lambda done, total: None)
    if store is not None:
        are_used = config.compile_cache_save_format == "unpacked"
        tell_edits(store.root, enumerate(pieces), are_used=are_used, is_whole=False)
    trace_timeline()
    plan, callables = plan_calls(split), [piece.call for piece in pieces]
    run = plan_function(plan, [callables], sizes=size_names(plan, [callables]) if config.plan_memory else None)
    if config.cudagraph_mode is CUDAGraphMode.NONE:
        return checked_at_first_call(run, graph_module, foreign)
    edited = [index for index, piece in enumerate(pieces) if piece.edited]
    graph = _recorded_graph(split, plan, run, example_inputs, edited)
    recordings = Recordings.configured(graph, target.recorder(), config)
    in_pieces = config.cudagraph_mode is CUDAGraphMode.PIECEWISE
    recordings.record_lazily(CUDAGraphMode.PIECEWISE if in_pieces else CUDAGraphMode.FULL, (0,))
    return checked_at_first_call(recordings, graph_module, foreign)


def _recorded_graph(
    split: SplitGraph, plan: ExecutionPlan, run: Callable[..., Any], inputs: Sequence[Any], edited: Iterable[int]
) -> RecordedGraph:
    """What recordings know of the plan's function: Dynamo gives weights as inputs, and no declared dims.

    Raises ConfigError for a graph of several sizes.
    """
    fakes = split.whole.fake_inputs
    if not all(isinstance(one, torch.Tensor) and all(isinstance(size, int) for size in one.shape) for one in fakes):
        raise ConfigError(
            "cudagraph_mode records calls of one size, and torch.compile has made a graph of several",
            where="torch.compile(backend='onegraph')",
            hint="give dynamic=False to torch.compile, or use onegraph.compile with dynamic_shapes",
        )
    graph = recorded_graph(
        plan,
        run,
        weights=(),
        input_names=plan.inputs,
        is_tensor=[True] * len(plan.inputs),
        sized=(),
        unrecordable=dict.fromkeys(edited, "edited: somebody has edited its code"),
        user_line=lambda piece, op: calling_line(called_lines(split.pieces[piece]), op),
    )
    owners = ("weight" if dynamo.is_of_module(one) else owner for one, owner in zip(inputs, graph.owners, strict=True))
    return replace(graph, owners=tuple(owners))


def _refuse_what_needs_a_range(config: ResolvedConfig) -> None:
    """Options that would be ignored in silence, since Dynamo alone decides which sizes a graph is for."""
    for name in _OF_SIZES:
        if getattr(config, name):
            shown = config.to_dict()[name]["value"]
            raise ConfigError(
                f"{name}={shown} ({config.why[name]}) can't be honoured below Dynamo: torch.compile "
                "decides which graphs there are, and for which sizes",
                where=name,
                hint="use onegraph.compile, or leave it out",
            )


def _refuse_unknown_ops(whole: FlatGraph, config: ResolvedConfig) -> None:
    """An op that this graph doesn't call may be in another one; one that isn't registered is a mistake."""
    asked = not config.why["splitting_ops"].startswith("level")
    for op in missing_ops(whole, config.splitting_ops) if asked else ():
        namespace, _, name = op.partition("::")
        if name and not hasattr(getattr(torch.ops, namespace), name):
            raise ConfigError(
                f"splitting_ops has {op!r}, and there is no such operator",
                where="splitting_ops",
                hint=nearest(op, called_ops(whole)),
            )
