"""Inductor's lowering of an op that has an overload `out`: it gets memory that Inductor has planned for the result.

Torch 2.13 does so by itself for custom ops, after it has asked of the inputs the strides that they have in eager; 2.11
calls the functional op, which allocates. Here inputs have to be contiguous in their order of dims, and no more: a slice
of a wider buffer is handed over as it lies.
"""

from __future__ import annotations

from typing import Any

from torch._inductor import ir
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.utils import convert_shape_to_inductor
from torch._inductor.virtualized import V


def lower_to_out(op: Any) -> None:
    """From now on Inductor calls the overload `out` for `op`, an OpOverload.

    Its result is contiguous; it takes tensors alone, of which the last may be None.
    """
    if op in lowerings:
        return
    packet = op.overloadpacket

    def lower(*args: Any) -> Any:
        value = V.graph.current_node.meta["val"]
        layout = ir.FixedLayout(value.device, value.dtype, convert_shape_to_inductor(value.shape))
        tensors = [arg for arg in args if arg is not None]
        kernel = ir.ExternKernelOut(
            layout=layout,
            inputs=[_in_order(arg) for arg in tensors],
            constant_args=args[len(tensors) :],
            python_kernel_name=f"torch.ops.{packet}.out",
            op_overload=packet.out,
        )
        return ir.TensorBox.create(kernel)

    register_lowering(op, type_promotion_kind=None)(lower)


def _in_order(tensor: Any) -> Any:
    realized = ir.ExternKernel.realize_input(tensor)
    return ir.ExternKernel.require_stride_order(realized, list(reversed(range(len(tensor.get_size())))))
