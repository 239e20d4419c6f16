"""One graph of torch.compile's, compiled and stored: the part of the pipeline that runs below Dynamo.

Takes the graph module and inputs that Dynamo hands to a backend; splits and compiles as with a captured graph. What
compiling assumes about sizes becomes Dynamo's guards, on a warm start as on a cold one; there is no declared range
and no ledger here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from onegraph.capture.custom_ops import checked_at_first_call, custom_ops
from onegraph.config.resolve import ResolvedConfig
from onegraph.errors import ConfigError, nearest
from onegraph.ir.graph import FlatGraph
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


def compile_dynamo_graph(
    graph_module: torch.fx.GraphModule, example_inputs: list[Any], config: ResolvedConfig, store: Store | None
) -> Callable[..., Any]:
    """A callable of the graph's inputs. Raises ConfigError if a gradient is needed, CompileError."""
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
    compiler = PieceCompiler(config, target, store, lambda conditions, region: ())
    rewriting = pass_settings(choose_passes(config).passes, config, target)
    with dynamo.COMPILE_LOCK:
        split = split_graph(whole, config.splitting_ops)
        split = replace(split, pieces=run_passes(split, rewriting).pieces)
        (pieces,) = compiler.compile_all(split.pieces, (None,), None, {}, lambda done, total: None)
    if store is not None:
        are_used = config.compile_cache_save_format == "unpacked"
        tell_edits(store.root, enumerate(pieces), are_used=are_used, is_whole=False)
    plan, callables = plan_calls(split), [piece.call for piece in pieces]
    run = plan_function(plan, [callables], sizes=size_names(plan, [callables]) if config.plan_memory else None)
    return checked_at_first_call(run, graph_module, foreign)


def _refuse_what_needs_a_range(config: ResolvedConfig) -> None:
    """Options that would be ignored in silence, since Dynamo alone decides which sizes a graph is for."""
    for name, value in {"compile_sizes": config.compile_sizes, "compile_ranges": config.compile_ranges}.items():
        if value:
            raise ConfigError(
                f"{name}={list(value)} ({config.why[name]}) can't be honoured below Dynamo: torch.compile "
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
