"""select_linear_kernels: a linear layer becomes `onegraph::linear`, which picks the kernel for the size of each call.

One graph and one artifact serve all sizes; which kernel is fastest for a weight's shape and a number of tokens was
measured on this machine (see `targets/`). Weights stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from onegraph.ir.fx_nodes import called, linear_operands, value_of
from onegraph.ir.passes import PassContext

LINEAR_KERNELS = "linear_kernels"
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class SelectLinearKernels:
    """No options."""

    name: ClassVar[str] = "select_linear_kernels"
    requires: ClassVar[frozenset[str]] = frozenset({LINEAR_KERNELS})

    def apply(self, graph: Graph, context: PassContext) -> int:
        rewrites = 0
        for node in list(graph.nodes):
            if called(node) != "linear":
                continue
            x, weight, bias = linear_operands(node)
            why_not = _why_not(x, weight, bias)
            if why_not:
                context.missed(node, why_not)
            elif context.may_rewrite():
                with graph.inserting_before(node):
                    call = context.call(torch.ops.onegraph.linear.default, (x, weight, bias), node)
                context.replace_all({node: call})
                rewrites += 1
        return rewrites


def _why_not(x: Any, weight: Any, bias: Any) -> str:
    """Why the op can't stand for the layer; "" where it can."""
    values = [value_of(one) for one in (x, weight, bias) if isinstance(one, Node)]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return "an operand has no known value"
    if len({(value.dtype, value.device) for value in values}) > 1:
        return "the operands differ in dtype"
    if values[0].dtype not in _DTYPES:
        return f"there are no kernels for {values[0].dtype}"
    if values[1].dim() != 2 or not values[1].is_contiguous():
        return "the weight isn't contiguous"
    return ""
