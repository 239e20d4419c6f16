"""Weights bound to a graph's callable: what residual code calls with the inputs alone.

The tensors are read from their places on every call, so that a replaced weight is used and not a stale one. A
replacement with another dtype, shape, layout or device than the graph was made for is a change of state where
that is checked, and an error where it isn't.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.errors import InputContractError
from onegraph.ir.artifact import PieceCallable
from onegraph.ir.graph import CapturedGraph, WeightInput
from onegraph.ir.ledger import StateEntry
from onegraph.torch_compat.torch_state import set_grad_enabled


@dataclass(frozen=True)
class BoundWeights:
    """`run` is a function of the graph's inputs; it runs without gradients, in inference mode if the caller is.

    `fit()` says whether the weights that stand in their places now are of the kind that the graph was made for,
    `changes()` names those that aren't, each with what it is now.
    """

    run: Callable[..., Any]
    fit: Callable[[], bool]
    changes: Callable[[], tuple[tuple[StateEntry, str], ...]]


def bind_weights(call: PieceCallable, captured: CapturedGraph, mutates_inputs: bool) -> BoundWeights:
    """The weights of the graph bound to `call`.

    With `mutates_inputs` each call checks that inputs share memory as they did when they were captured.
    """
    places = [(weight.holder, weight.key) for weight in captured.weights]
    known = [holder[key] for holder, key in places]
    facts = [_facts(tensor) for tensor in known]
    dtypes = [_dtype(tensor) for tensor in known]
    fakes = captured.fake_inputs[len(places) :]
    tensors = [index for index, fake in enumerate(fakes) if isinstance(fake, torch.Tensor)] if mutates_inputs else []
    num_storages = _num_storages([fakes[index] for index in tensors])
    is_grad_enabled, is_not = torch.is_grad_enabled, operator.is_not

    def run(*inputs: Any) -> Any:
        nonlocal known
        weights = [holder[key] for holder, key in places]
        if any(map(is_not, weights, known)):
            _check_replaced(captured.weights, weights, facts)
            known = weights
        elif list(map(_dtype, weights)) != dtypes:  # module.to(dtype) keeps the Parameter and changes its data
            _check_replaced(captured.weights, weights, facts)
        if tensors and _num_storages([inputs[index] for index in tensors]) != num_storages:
            _refuse_sharing(captured, num_storages)
        if is_grad_enabled():
            set_grad_enabled(False)
            try:
                return call(*weights, *inputs)
            finally:
                set_grad_enabled(True)
        return call(*weights, *inputs)

    def fit() -> bool:
        weights = [holder[key] for holder, key in places]
        if any(map(is_not, weights, known)) or list(map(_dtype, weights)) != dtypes:
            return list(map(_facts, weights)) == facts
        return True

    def changes() -> tuple[tuple[StateEntry, str], ...]:
        now = [_facts(holder[key]) for holder, key in places]
        return tuple(
            (StateEntry(weight.name, str(then)), str(facts_now))
            for weight, then, facts_now in zip(captured.weights, facts, now, strict=True)
            if facts_now != then
        )

    return BoundWeights(run, fit, changes)


def _dtype(tensor: Any) -> Any:
    return getattr(tensor, "dtype", None)  # a weight may have been replaced by None


def _num_storages(tensors: list[torch.Tensor]) -> int:
    return len({tensor.untyped_storage()._cdata for tensor in tensors})


def _refuse_sharing(captured: CapturedGraph, num_storages: int) -> None:
    raise InputContractError(
        "the module changes an input in place, and its inputs don't share memory as they did when it was captured "
        f"(then in {num_storages} different storages)",
        where=", ".join(captured.input_names[:8]),
        hint="pass tensors of their own memory, or compile once more for inputs that share it",
    )


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
