"""Which pieces must run op by op, because what they change is seen through several tensors that cross a border.

A compiler sees one piece. Where a piece changes memory that two of its inputs show, it can't tell for every size how
they overlap; where two of its outputs show memory that a later piece changes, it may give them memory of their own.
Takes the runs of nodes; gives a reason for each of those pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch.fx import Node

from onegraph.ir.fx_nodes import changed_arguments, storage_of


def eager_reason(
    inputs: Iterable[Node], changed: set[int], outputs: Iterable[Node], changed_later: set[int]
) -> str | None:
    """Why a piece can't be compiled, None for nearly all: `changed` are the storages that it changes."""
    if _several_in(inputs, changed):
        return "it changes memory that several of its inputs show"
    if _several_in(outputs, changed_later):
        return "several of its results show memory that is changed later"
    return None


def _several_in(nodes: Iterable[Node], storages: set[int]) -> bool:
    if not storages:
        return False
    return any(count > 1 for storage, count in Counter(map(storage_of, nodes)).items() if storage in storages)


def changed_storages(nodes: Iterable[Node]) -> set[int]:
    """The storages of all tensors that a call may change."""
    changed = (storage_of(one) for node in nodes for one in changed_arguments(node))
    return {storage for storage in changed if storage is not None}
