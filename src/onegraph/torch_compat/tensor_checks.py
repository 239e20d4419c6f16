"""One call into C++ that compares several tensors with what they were: Dynamo's own tensor guards.

Takes example tensors, and for each the sizes and strides to compare with. Gives a function of as many tensors. It is
a fast path: it may refuse what is all right (a Parameter for a tensor, an inference tensor for a plain one), and so
stands in front of a check that decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards

DispatchState = tuple[Any, Any]


def dispatch_state() -> DispatchState:
    """The dispatch keys that this thread adds to all tensors (autocast's, say), and those that it leaves out."""
    return torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def tensor_check(
    tensors: Sequence[torch.Tensor],
    sizes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    state: DispatchState,
) -> Callable[..., bool]:
    """Whether tensors have the examples' class, dtype, device, dispatch keys (so also the conjugate and negative
    bits), requires_grad, rank, and the given sizes and strides, in a thread with the given dispatch state.
    """
    with torch._C._ForceDispatchKeyGuard(*state):
        guards = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(one) for one in sizes],
            dynamic_dims_strides=[list(one) for one in strides],
        )
    return guards.check
