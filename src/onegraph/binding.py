"""Weights bound to a graph's callable: what residual code calls with the inputs alone.

The tensors are read from their places on every call, so that a replaced weight is used and not a stale one. A
replacement with another dtype, shape, layout or device than the graph was made for is a change of state where
that is checked, and an error where it isn't. Merged weights stand behind the weights that they are made of.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.errors import InputContractError
from onegraph.ir.graph import CapturedGraph, GraphCallable, WeightInput
from onegraph.ir.ledger import StateEntry
from onegraph.ir.weights import MergedWeight
from onegraph.torch_compat.overlap import overlapping, share_storage
from onegraph.torch_compat.tensor_checks import KindCheck, tensor_facts
from onegraph.torch_compat.torch_state import set_grad_enabled
from onegraph.weights import Alignment, BoundGroups, WeightStore


@dataclass(frozen=True)
class BoundWeights:
    """`run` is a function of the graph's inputs; it runs without gradients, in inference mode if the caller is.

    `fit()` says whether the weights that stand in their places now are of the kind that the graph was made for,
    `changes()` names those that aren't, each with what it is now.
    """

    run: Callable[..., Any]
    fit: Callable[[], bool]
    changes: Callable[[], tuple[tuple[StateEntry, str], ...]]


@dataclass(frozen=True)
class _Seen:
    """Weights as one look found them; no two looks have the same `number`.

    `version` is that of what is merged, `asked` what `fit` had left by then.
    """

    weights: list[Any]
    merged: Sequence[Any]
    version: int | None
    asked: object
    number: int


def bind_weights(
    call: GraphCallable,
    graph_weights: Sequence[WeightInput],
    input_names: Sequence[str],
    tensors: Sequence[int],
    groups: BoundGroups | None = None,
    *,
    told: Callable[[int], None] | None = None,
) -> BoundWeights:
    """The weights of a graph bound to `call`, which takes the weights, those merged in `groups`, and the inputs.

    None of the inputs `tensors`, by their indices, may overlap another one or a weight in memory, in any call: a
    graph that changes inputs was compiled knowing which do.

    With `told`, the module's owner says when weights may have been replaced or moved, by `fit()`: they are looked at in
    the first call after it, and are taken as they were then in others. Each call tells of which look it has them.
    """
    places = [(weight.holder, weight.key) for weight in graph_weights]
    known = [holder[key] for holder, key in places]
    same_kinds = KindCheck(known)
    facts = same_kinds.facts
    names = [input_names[index] for index in tensors] + [weight.name for weight in graph_weights]
    by_storage = _by_storage(known) if tensors else {}
    version = None if groups is None else groups.version
    is_grad_enabled, is_not = torch.is_grad_enabled, operator.is_not
    asked, numbers = object(), itertools.count()
    seen: _Seen | None = None

    def standing() -> _Seen:
        """What stands in its place now."""
        nonlocal known, by_storage
        now = asked
        try:
            weights = [holder[key] for holder, key in places]
        except (KeyError, ValueError):  # deleted, from a dict or a closure
            weights = _standing(places)
        if any(map(is_not, weights, known)):
            _check_replaced(graph_weights, weights, facts)
            known, by_storage = weights, _by_storage(weights) if tensors else by_storage
        elif not same_kinds(weights):  # module.to(dtype) and .data = keep the Parameter
            _check_replaced(graph_weights, weights, facts)
        merged = () if groups is None else groups.tensors(weights)
        return _Seen(weights, merged, None if groups is None else groups.version, now, next(numbers))

    def run(*inputs: Any) -> Any:
        nonlocal by_storage, version, seen
        found = seen
        if found is None or found.asked is not asked or (groups is not None and found.version != groups.version):
            found = standing()
        if told is not None:
            seen = found
            told(found.number)
        weights, merged = found.weights, found.merged
        if tensors:
            if groups is not None and version != groups.version:
                version, by_storage = groups.version, _by_storage(weights)
            _refuse_overlap(names, [inputs[index] for index in tensors], weights, by_storage)
        if is_grad_enabled():
            set_grad_enabled(False)
            try:
                return call(*weights, *merged, *inputs)
            finally:
                set_grad_enabled(True)
        return call(*weights, *merged, *inputs)

    def fit() -> bool:
        nonlocal asked
        asked = object()
        weights = _standing(places)
        if any(map(is_not, weights, known)):
            return list(map(_facts, weights)) == facts
        return same_kinds(weights)

    def changes() -> tuple[tuple[StateEntry, str], ...]:
        now = list(map(_facts, _standing(places)))
        return tuple(
            (StateEntry(weight.name, str(then)), str(facts_now))
            for weight, then, facts_now in zip(graph_weights, facts, now, strict=True)
            if facts_now != then
        )

    return BoundWeights(run, fit, changes)


def refuse_overlap(captured: CapturedGraph, tensors: Sequence[int]) -> None:
    """Raises InputContractError where tensors of the captured call overlap that mustn't, see `bind_weights`."""
    weights, inputs = captured.fake_inputs[: len(captured.weights)], captured.fake_inputs[len(captured.weights) :]
    names = [captured.input_names[index] for index in tensors] + [weight.name for weight in captured.weights]
    _refuse_overlap(names, [inputs[index] for index in tensors], weights, _by_storage(weights))


def group_indices(captured: CapturedGraph, merged: Sequence[MergedWeight]) -> tuple[tuple[int, ...], ...]:
    """The graph's weights that each merged one is made of, by their indices."""
    placeholders = captured.graph_module.graph.find_nodes(op="placeholder")
    index_of = {node.name: index for index, node in enumerate(placeholders[: len(captured.weights)])}
    return tuple(tuple(index_of[source] for source in one.sources) for one in merged)


def bind_groups(
    owned: WeightStore,
    weights: Sequence[WeightInput],
    indices: Sequence[Sequence[int]],
    required_alignment: Alignment,
) -> BoundGroups | None:
    """Merges the weights, which re-points tensors of the module; None where there are none to merge."""
    return BoundGroups(owned, weights, indices, required_alignment) if indices else None


class _Gone:
    """Stands for a weight that was deleted."""


def _standing(places: Sequence[tuple[Any, Any]]) -> list[Any]:
    """The weights at their places now, `_Gone()` for one that isn't there."""
    found: list[Any] = []
    for holder, key in places:
        try:
            found.append(holder[key])
        except (KeyError, ValueError):
            found.append(_Gone())
    return found


def _by_storage(weights: Sequence[Any]) -> dict[int, list[int]]:
    """Storage -> the weights in it, as indices."""
    found: dict[int, list[int]] = {}
    for index, weight in enumerate(weights):
        if isinstance(weight, torch.Tensor) and weight.layout == torch.strided:
            found.setdefault(weight.untyped_storage()._cdata, []).append(index)
    return found


def _refuse_overlap(
    names: list[str], inputs: list[torch.Tensor], weights: Sequence[Any], by_storage: Mapping[int, list[int]]
) -> None:
    """Raises InputContractError for an input that overlaps another or a weight; `names` has those of both, in order."""
    if not share_storage(inputs, by_storage):
        return
    pair = overlapping(inputs)
    for index, tensor in enumerate(inputs):
        for weight in by_storage.get(tensor.untyped_storage()._cdata, ()):
            if pair is None and overlapping([tensor, weights[weight]]) is not None:
                pair = index, len(inputs) + weight
    if pair is not None:
        first, second = (re.sub(r"^L\['(\w+)'\]", r"\1", names[index]) for index in pair)
        raise InputContractError(
            f"{first} and {second} share memory, and the module changes an input or a buffer in place, which may be "
            "the other one too: compiled code could read it before or after",
            where=f"argument {first}",
            hint="pass a tensor of its own memory (clone), or one tensor whose views the module takes itself",
        )


def _facts(tensor: Any) -> tuple[Any, ...]:
    return ("nothing",) if isinstance(tensor, _Gone) else tensor_facts(tensor)


def _check_replaced(weights: Sequence[WeightInput], tensors: list[Any], facts: list[tuple[Any, ...]]) -> None:
    for weight, tensor, expected in zip(weights, tensors, facts, strict=True):
        if _facts(tensor) != expected:
            raise InputContractError(
                f"{weight.name} was replaced by {_facts(tensor)}; the module was compiled for {expected}",
                where=f"weight {weight.name}",
                hint="compile the module again after changing the dtype, device or shape of its weights",
            )
