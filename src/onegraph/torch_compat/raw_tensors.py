"""Tensors over memory that is told by its address, and the addresses of a tensor's storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def tensor_at(pointer: int, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the dtype and device of `like`. It doesn't own its memory: keep whoever does."""
    num_bytes = torch.Size(shape).numel() * like.element_size()
    storage = torch._C._construct_storage_from_data_pointer(pointer, like.device, num_bytes)
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, 0, tuple(shape))


def unowned_storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Another storage over the memory of a tensor's: it doesn't keep that alive."""
    storage = tensor.untyped_storage()
    return torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())


def storage_span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """The first address of the tensor's storage, and the one after its last; None for a tensor without memory."""
    if tensor.layout != torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass that wraps others
        return None
    return (start, start + storage.nbytes()) if start else None
