"""One graph of torch.compile's, compiled and stored: the part of the pipeline that runs below Dynamo.

Takes the graph module and inputs that Dynamo hands to a backend. What compiling assumes about sizes becomes
Dynamo's guards, on a warm start as on a cold one; there is no declared range and no ledger here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from onegraph.capture.custom_ops import checked_at_first_call, custom_ops
from onegraph.config.resolve import ResolvedConfig
from onegraph.errors import ConfigError
from onegraph.ir.piece import Piece
from onegraph.piece_compiler import PieceCompiler
from onegraph.store.store import Store
from onegraph.targets import target_for
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
    fakes = tuple(n.meta["example_value"] for n in graph_module.graph.find_nodes(op="placeholder"))
    devices = {value.device.type for value in fakes if isinstance(value, torch.Tensor)} or {"cpu"}
    piece = Piece(
        index=0,
        kind="compiled",
        graph_module=graph_module,
        fake_inputs=fakes,
        fake_mode=dynamo.current_fake_mode(),
    )
    compiler = PieceCompiler(config, target_for(devices.pop()), store, lambda conditions, region: ())
    with dynamo.COMPILE_LOCK:
        call = compiler.compile(piece, None).call
    return checked_at_first_call(lambda *inputs: call(list(inputs)), graph_module, custom_ops(graph_module))


def _refuse_what_needs_a_range(config: ResolvedConfig) -> None:
    """Options that would be ignored in silence, since Dynamo alone decides which sizes a graph is for."""
    asked = {
        "compile_sizes": config.compile_sizes,
        "compile_ranges": config.compile_ranges,
        "splitting_ops": config.splitting_ops if not config.why["splitting_ops"].startswith("level") else (),
    }
    for name, value in asked.items():
        if value:
            raise ConfigError(
                f"{name}={list(value)} ({config.why[name]}) can't be honoured below Dynamo: torch.compile "
                "decides which graphs there are, and for which sizes",
                where=name,
                hint="use onegraph.compile, or leave it out",
            )
