"""AOTAutograd alone: functionalised and decomposed, then run op by op. The `aot_eager` backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.virtualized import V


def compile_graph(
    graph_module: torch.fx.GraphModule, fake_inputs: list[Any], fake_mode: Any
) -> tuple[Callable[..., Any], bool]:
    """Runs AOTAutograd under no_grad; gives its callable, which takes the inputs flat, and whether it changes some.

    Mutating ops are put back in place by the passes that Inductor uses, so that a KV cache isn't cloned. A random
    draw that nobody uses stays, as in eager: torch removes dead ones unless Inductor is told to draw as eager does.
    """

    def run_in_place(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        with V.set_fake_mode(fake_mode):
            reinplace_inplaceable_ops(_fake_tensor_updater(gm), gm.graph)
            decompose_auto_functionalized(gm.graph)
        gm.recompile()

        def boxed(args: list[Any]) -> Any:
            taken = list(args)
            args.clear()
            return gm(*taken)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    context = torch._guards.TracingContext(fake_mode)
    drawn_as_eager = torch._inductor.config.patch(fallback_random=True)
    with torch.no_grad(), torch._guards.tracing(context), drawn_as_eager:
        function: Callable[..., Any] = aot_module_simplified(
            graph_module,
            fake_inputs,
            fw_compiler=run_in_place,
            inference_compiler=run_in_place,
            keep_inference_input_mutations=True,
        )
        metadata = context.fw_metadata
    return function, metadata is None or any(info.mutates_data for info in metadata.input_info)


def _fake_tensor_updater(gm: torch.fx.GraphModule) -> FakeTensorUpdater:
    """It takes the graph module in torch 2.13, and the graph before."""
    takes_module = "gm" in inspect.signature(FakeTensorUpdater.__init__).parameters
    return FakeTensorUpdater(gm if takes_module else gm.graph)  # type: ignore[arg-type]
