"""Storages that are watched without being kept alive; torch has no public name for a weak reference to one."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["StorageWeakRef", "alive", "storage_of"]


def storage_of(tensor: torch.Tensor) -> StorageWeakRef:
    """A weak reference to a tensor's storage: `expired()` when the storage is freed, `cdata` tells storages apart."""
    return StorageWeakRef(tensor.untyped_storage())


def alive(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    """The storage, which the caller keeps alive from here on; None where it is freed."""
    if reference.expired():
        return None
    return torch.UntypedStorage._new_with_weak_ptr(reference.cdata)  # type: ignore[no-any-return]
