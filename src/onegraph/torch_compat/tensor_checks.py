"""What kind of tensor stands somewhere, and one call into C++ that compares several: Dynamo's own tensor guards.

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


def tensor_facts(tensor: Any) -> tuple[Any, ...]:
    """dtype, device, shape and strides, as far as the tensor has them; the type of what is none."""
    if not isinstance(tensor, torch.Tensor):
        return (type(tensor),)
    if tensor.is_nested:  # has no shape
        return (tensor.dtype, tensor.device, "nested")
    strides = tensor.stride() if tensor.layout == torch.strided else tensor.layout
    return (tensor.dtype, tensor.device, tensor.shape, strides)


class KindCheck:
    """Whether the tensors that were given have the facts that they had: `module.to()` and `.data =` keep the object.

    It is for the same objects alone: C++ ends the process when a nested tensor stands in the place of another.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        self.facts = list(map(tensor_facts, tensors))
        self._checks: dict[bool, Callable[..., bool]] = {}

    def __call__(self, tensors: Sequence[Any]) -> bool:
        mode = torch.is_inference_mode_enabled()  # which is among the dispatch keys that C++ compares
        check = self._checks.get(mode)
        if check is not None and check(*tensors):
            return True
        if list(map(tensor_facts, tensors)) != self.facts:
            return False
        if tensors and all(map(_is_strided, tensors)):
            sizes, strides = [facts[2] for facts in self.facts], [facts[3] for facts in self.facts]
            self._checks[mode] = tensor_check(tensors, sizes, strides, dispatch_state())
        return True


def _is_strided(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_nested
