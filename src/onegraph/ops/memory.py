"""Which memory tensors lie in: whether two share it, and clones that share it as their originals do.

Takes real tensors of any layout. Memory is told by its addresses: two storages over one memory, as numpy makes
them, count as sharing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNMENT = 64


def share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether the storages of two tensors have a byte in common."""
    low, high = _extent(first)
    other_low, other_high = _extent(second)
    return low < other_high and other_low < high and first.device == second.device


def clone_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Clones with the same dtypes, sizes, strides and contents; those that share a storage share one clone of it.

    Only the part of a storage that the tensors span is copied, so a view of a large buffer stays cheap. Tensors
    that aren't strided, or are lazily conjugated or negated, are cloned one by one.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    clones = list(tensors)
    for index, tensor in enumerate(tensors):
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            clones[index] = tensor.detach().clone()
        else:
            groups.setdefault(_extent(tensor), []).append(index)
    for indices in groups.values():
        for index, clone in zip(indices, _clone_storage([tensors[i] for i in indices]), strict=True):
            clones[index] = clone
    return clones


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and size hold the same bits: NaN equals itself, -0.0 isn't 0.0."""
    if first.layout != torch.strided or first.is_quantized:
        return bool(torch.equal(first, second))
    flat = [t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return bool(torch.equal(*flat))


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of the tensor's whole storage; (0, 0) for none."""
    if tensor.layout != torch.strided:
        return (0, 0)
    storage = tensor.untyped_storage()
    start = storage.data_ptr()
    return (start, start + storage.nbytes())


def _clone_storage(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    spans = [_span(tensor) for tensor in tensors]
    low = min((start for start, end in spans if start < end), default=0) // _ALIGNMENT * _ALIGNMENT
    high = max((end for start, end in spans if start < end), default=0)
    whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    whole.set_(tensors[0].untyped_storage())  # type: ignore[call-overload]
    copied = whole[low:high].clone()
    clones = []
    for tensor, (start, _) in zip(tensors, spans, strict=True):
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        offset = (start - low) // tensor.element_size() if tensor.numel() else 0
        clones.append(flat.set_(copied.untyped_storage(), offset, tensor.size(), tensor.stride()))
    return clones


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor reaches, from its first to behind its last element."""
    start = tensor.storage_offset() * tensor.element_size()
    if tensor.numel() == 0:
        return (start, start)
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (start, start + (last + 1) * tensor.element_size())
