"""Weights bound to a graph's callable: what residual code calls with the inputs alone.

The tensors are read from their places on every call, so that a replaced weight is used and not a stale one; a
replacement with another dtype, shape, layout or device than the graph was made for is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from onegraph.errors import InputContractError
from onegraph.ir.artifact import PieceCallable
from onegraph.ir.graph import CapturedGraph, WeightInput


def bind_weights(call: PieceCallable, captured: CapturedGraph) -> Callable[..., Any]:
    """A function of the graph's inputs. It runs without gradients, in inference mode if the caller is in it."""
    places = [(weight.holder, weight.key) for weight in captured.weights]
    known = [holder[key] for holder, key in places]
    facts = [_facts(tensor) for tensor in known]
    dtype_of = operator.attrgetter("dtype")
    dtypes = [getattr(tensor, "dtype", None) for tensor in known]
    is_grad_enabled, no_grad, is_not = torch.is_grad_enabled, torch.no_grad, operator.is_not

    def run(*inputs: Any) -> Any:
        nonlocal known
        weights = [holder[key] for holder, key in places]
        if any(map(is_not, weights, known)):
            _check_replaced(captured.weights, weights, facts)
            known = weights
        elif list(map(dtype_of, weights)) != dtypes:  # module.to(dtype) keeps the Parameter and changes its data
            _check_replaced(captured.weights, weights, facts)
        if is_grad_enabled():
            with no_grad():
                return call(*weights, *inputs)
        return call(*weights, *inputs)

    return run


def _facts(tensor: Any) -> tuple[Any, ...]:
    if not isinstance(tensor, torch.Tensor):
        return (type(tensor),)
    return (
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.stride() if tensor.layout == torch.strided else None,
    )


def _check_replaced(weights: tuple[WeightInput, ...], tensors: list[Any], facts: list[tuple[Any, ...]]) -> None:
    for weight, tensor, expected in zip(weights, tensors, facts, strict=True):
        if _facts(tensor) != expected:
            raise InputContractError(
                f"{weight.name} was replaced by {_facts(tensor)}; the module was compiled for {expected}",
                where=f"weight {weight.name}",
                hint="compile the module again after changing the dtype, device or shape of its weights",
            )
