"""Tensors that overlap in memory: where a graph writes to one, the others change, and compiled code may not see it.

Takes the tensors of a call, or the symbolic ones of a graph. Tensors that lie apart in one storage, such as the
layers of a KV cache, don't overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Place = tuple[int, int, int]
"""Storage, first byte, and the byte after the last one."""


def share_storage(tensors: Sequence[torch.Tensor], other_storages: Mapping[int, object]) -> bool:
    """Whether two of the tensors share a storage with one another or with the others: only then can they overlap."""
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    return len(storages) != len(tensors) or not other_storages.keys().isdisjoint(storages)


def overlapping(tensors: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    """The first two tensors, as indices, that overlap; None if none do.

    Strided tensors that interleave count as overlapping, and so do tensors of one storage with symbolic sizes.
    """
    places = sorted((*_place(tensor), index) for index, tensor in enumerate(tensors) if not _is_empty(tensor))
    furthest: tuple[int, int, int, int] | None = None
    for place in places:
        if furthest is not None and place[0] == furthest[0] and place[1] < furthest[2]:
            first, second = sorted((furthest[3], place[3]))
            return first, second
        if furthest is None or place[0] != furthest[0] or place[2] > furthest[2]:
            furthest = place
    return None


def _is_empty(tensor: torch.Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in tensor.shape)


def _place(tensor: torch.Tensor) -> Place:
    storage = tensor.untyped_storage()
    lengths = [*tensor.shape, *tensor.stride(), tensor.storage_offset()]
    if tensor.layout != torch.strided or not all(type(length) is int for length in lengths):
        return storage._cdata, 0, 1 << 62
    start = tensor.storage_offset() * tensor.element_size()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return storage._cdata, start, start + (last + 1) * tensor.element_size()
