"""Whether a model's weights are those of the last look: what other weights have computed is no longer right.

Takes: the model. Keeps: where each weight lay, and how often it had been written, without keeping it alive. A write
that goes around the tensor (`weight.data.copy_`, another process, a pointer) isn't counted by torch, and not seen here.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from onegraph.torch_compat.storages import storage_of


class WeightsSeen:
    """The weights of one module; something that is no module has none."""

    def __init__(self, module: Any) -> None:
        self._module = module if isinstance(module, torch.nn.Module) else torch.nn.Module()
        self._look()

    def changed(self) -> bool:
        """Looks again: whether a parameter or buffer was written or replaced since the last look."""
        # where a storage is gone, its address may be another weight's now
        if self._facts() == self._seen and not any(storage.expired() for storage in self._storages):
            return False
        self._look()
        return True

    def _look(self) -> None:
        self._seen, self._storages = self._facts(), [storage_of(weight) for weight in self._weights()]

    def _facts(self) -> list[tuple[int, int]]:
        return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in self._weights()]

    def _weights(self) -> Iterator[torch.Tensor]:
        return chain(self._module.parameters(), self._module.buffers())
