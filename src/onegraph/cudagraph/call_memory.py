"""Whose memory the tensors of a recorded call lie in: the caller's, that of weights and caches, or the recording's own.

Takes the inputs and results of a plan's function. Tells what of it a caller may keep, and gives it away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from onegraph.cudagraph.graph import RecordedGraph
from onegraph.errors import RecordingError
from onegraph.ir.plan import ExecutionPlan
from onegraph.ops.memory import clone_together
from onegraph.torch_compat.overlap import overlapping

Kind = int | str | None
"""What a result is: an input, by its index; `ours`, in the recording's memory; `theirs`, in memory that stays the
caller's, such as a view of a cache; or None for what is no tensor."""


def result_kinds(
    plan: ExecutionPlan, results: Sequence[Any], inputs: Sequence[Any], pinned: Iterable[int]
) -> tuple[Kind, ...]:
    """The kind of each result; `pinned` are the inputs, by index, that stay where they are."""
    places = {name: i for i, name in enumerate(plan.inputs)}
    theirs = {_storage_address(inputs[i]) for i in pinned}

    def kind(name: Any, result: Any) -> Kind:
        if isinstance(name, str) and name in places:
            return places[name]
        if not isinstance(result, torch.Tensor):
            return None
        return "theirs" if _storage_address(result) in theirs else "ours"

    return tuple(kind(*pair) for pair in zip(plan.results, results, strict=True))


def shows_input(plan: ExecutionPlan, results: Sequence[Any], inputs: Sequence[Any], indices: Sequence[int]) -> bool:
    """Whether a result lies in the memory of one of these inputs, and isn't that input."""
    names = {plan.inputs[i] for i in indices}
    memory = {_storage_address(inputs[i]) for i in indices}
    return any(
        isinstance(one, torch.Tensor) and name not in names and _storage_address(one) in memory
        for name, one in zip(plan.results, results, strict=True)
    )


def handed_out(
    kinds: Sequence[Kind], results: Sequence[Any], inputs: Sequence[Any], *, copied: bool
) -> tuple[Any, ...]:
    """What the caller gets: other tensors over the recording's memory, or `copied` into memory of its own.

    They share memory with one another as the results do.
    """
    given = [
        inputs[kind] if isinstance(kind, int) else one if kind is None else one.detach()
        for kind, one in zip(kinds, results, strict=True)
    ]
    if copied:
        ours = [i for i, kind in enumerate(kinds) if kind == "ours"]
        for i, one in zip(ours, clone_together([given[i] for i in ours]), strict=True):
            given[i] = one
    return tuple(given)


def refuse_overlap(graph: RecordedGraph, inputs: Sequence[Any], steps: Sequence[int], pinned: Sequence[int]) -> None:
    """Raises RecordingError where filling one of the `steps` would change another, or what is `pinned`."""
    places = [*steps, *pinned]
    pair = overlapping([inputs[i] for i in places]) if steps else None
    if pair is not None and min(pair) < len(steps):
        first, second = (graph.names[places[i]] for i in pair)
        raise RecordingError(
            f"{first} and {second} share memory, and later calls fill one without the other",
            where="record",
            hint="record a call with tensors that lie apart, such as those of slots()",
            tensor=first,
        )


def share_storage(tensors: Iterable[torch.Tensor], statics: Iterable[torch.Tensor]) -> bool:
    """Whether one of the tensors may lie in the memory of a static one."""
    theirs = {_storage_address(static) for static in statics}
    return any(_storage_address(one) in theirs for one in tensors)


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as after `expand`: such a tensor can't be filled."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """In memory of its own, with the same strides."""
    return clone_together([tensor])[0]


def _storage_address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
