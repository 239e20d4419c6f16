"""Whether a model's weights are those of the last look: what other weights have computed is no longer right.

Takes: the model. Keeps: where each weight lay, and how often it had been written, without keeping it alive. A write
that goes around the tensor (`weight.data.copy_`, another process, a pointer) isn't counted by torch, and not seen here.
"""

from itertools import chain
from typing import Any

import torch

from onegraph.torch_compat.storages import StorageWeakRef, storage_of


class WeightsSeen:
    """The weights of one module; something that is no module has none."""

    def __init__(self, module: Any) -> None:
        self._module = module if isinstance(module, torch.nn.Module) else torch.nn.Module()
        self._seen = self._look()

    def changed(self) -> bool:
        """Looks again: whether a parameter or buffer was written or replaced since the last look."""
        before, self._seen = self._seen, self._look()
        return (
            any(storage.expired() for _, _, storage in before)  # its address may be another weight's now
            or [fact[:2] for fact in before] != [fact[:2] for fact in self._seen]
        )

    def _look(self) -> list[tuple[int, int, StorageWeakRef]]:
        weights = chain(self._module.parameters(), self._module.buffers())
        return [(w.data_ptr(), 0 if w.is_inference() else w._version, storage_of(w)) for w in weights]
