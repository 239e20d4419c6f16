"""One call into C++ that compares several tensors with what they were: Dynamo's own tensor guards.

Takes example tensors, and for each the sizes and strides to compare with. Gives a function of as many tensors. It is
a fast path: it may refuse what is all right (a Parameter for a tensor, an inference tensor for a plain one), and so
stands in front of a check that decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch._C._dynamo.guards import TensorGuards


def tensor_check(
    tensors: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]
) -> Callable[..., bool]:
    """Whether tensors have the examples' class, dtype, device, dispatch keys (so also the conjugate and negative
    bits), requires_grad, rank, and the given sizes and strides.
    """
    guards = TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(one) for one in sizes],
        dynamic_dims_strides=[list(one) for one in strides],
    )
    return guards.check
