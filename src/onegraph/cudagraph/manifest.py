"""The memory that a recording relies on and doesn't hold itself: addresses, with what has to be alive there.

Takes the tensors that a recording was made with, by name. Tells which tensor of a later call lies elsewhere, and
whether the one that was recorded is still there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from onegraph.errors import RecordingError
from onegraph.torch_compat.storages import StorageWeakRef, storage_of

_HINTS = {
    "weight": "give on_memory_change=rerecord, or record again after weights were loaded or moved",
    "input": "pass the same tensor and fill it in place, or give on_memory_change=rerecord",
}


@dataclass(frozen=True)
class MemoryUse:
    """A tensor that is read or written by its address. `owner` is `weight` or `input`."""

    name: str
    owner: str
    address: int
    num_bytes: int
    storage: StorageWeakRef = field(compare=False, repr=False)

    @classmethod
    def of(cls, name: str, owner: str, tensor: torch.Tensor) -> MemoryUse:
        return cls(name, owner, tensor.data_ptr(), tensor.nbytes, storage_of(tensor))

    def problem(self, tensor: torch.Tensor) -> str | None:
        """What is wrong if `tensor` stands in its place now; None if it lies where the recorded one did."""
        if tensor.data_ptr() == self.address:
            return None
        freed = ", which was freed" if self.storage.expired() else ""
        return f"it was recorded at {self.address:#x}{freed}, and lies at {tensor.data_ptr():#x} now"

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "owner": self.owner, "address": self.address, "bytes": self.num_bytes}


@dataclass(frozen=True)
class Manifest:
    """`uses` are in the order of the tensors that `changed` takes."""

    uses: tuple[MemoryUse, ...]

    def changed(self, tensors: Sequence[torch.Tensor]) -> RecordingError:
        """The error for the first tensor that doesn't lie where the recorded one did; at least one doesn't."""
        for use, tensor in zip(self.uses, tensors, strict=True):
            problem = use.problem(tensor)
            if problem is not None:
                return RecordingError(
                    f"{use.name} ({use.owner}) isn't the memory that was recorded: {problem}",
                    where=f"a recording that reads {use.name}",
                    hint=_HINTS.get(use.owner),
                    tensor=use.name,
                )
        raise AssertionError("no tensor has moved")
