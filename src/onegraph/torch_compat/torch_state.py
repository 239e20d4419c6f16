"""Torch's global switches that change what a compiler makes of the same graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._device

set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Sets this thread's grad mode, at a tenth of what the context manager `torch.no_grad` costs."""

GLOBAL_READS: Mapping[str, Callable[[], Any]] = {
    "torch.get_default_dtype()": torch.get_default_dtype,
    "torch.are_deterministic_algorithms_enabled()": torch._C._get_deterministic_algorithms,
    "torch.utils.deterministic.fill_uninitialized_memory": torch._C._get_deterministic_fill_uninitialized_memory,
    "torch.get_float32_matmul_precision()": torch._C._get_float32_matmul_precision,
    "the default device": lambda: torch.utils._device.CURRENT_DEVICE,
    "torch function modes": torch._C._len_torch_function_stack,
    "torch.backends.mkldnn.enabled": torch._C._get_mkldnn_enabled,
}
"""Switches that change what the same Python code computes, by the names that users know; each takes nothing."""


def compile_state() -> dict[str, Any]:
    """The switches as JSON-able facts: determinism, precision, backends, number of threads is the target's."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic_fill": torch.utils.deterministic.fill_uninitialized_memory,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()),
        "mkldnn": bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled),
        "autocast": {
            device: [torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device))]
            for device in ("cpu", "cuda")
        },
    }


def is_operator(value: Any) -> bool:
    """Whether the value is an operator, or all overloads of one."""
    return isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket)


def is_composite(op: Any) -> bool:
    """Whether an operator (an OpOverload) is a composition of others, which a compiler traces through."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"))
