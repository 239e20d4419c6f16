"""Which memory a call uses that it hasn't made, and which of that it writes: seen at the dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onegraph.torch_compat.operators import OpOverload, changed_arguments, named_arguments
from onegraph.torch_compat.recordable import CONSTANT, storage_key, tensors


class WatchedRun(TorchDispatchMode):
    """Inside, this thread's operators run as always.

    `used` are tensors over memory that was there before, by their storages' keys; `written` are the keys of those that
    were changed. With `restores`, `undo` gives these the values back that they had.
    """

    supports_higher_order_operators = True

    def __init__(self, *, restores: bool) -> None:
        super().__init__()
        self.used: dict[int, torch.Tensor] = {}
        self.written: set[int] = set()
        self._restores = restores
        self._made: set[int] = set()
        self._before: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _plain((args, kwargs))
        if isinstance(func, OpOverload) and func._schema.name == CONSTANT:
            self._made |= given.keys()
        for key, one in given.items():
            if key not in self._made:
                self.used.setdefault(key, one)
        if isinstance(func, OpOverload):
            named = named_arguments(func, args, kwargs)
            self._note_written(_plain([named.get(name) for name in changed_arguments(func)]))
        result = func(*args, **kwargs)
        self._made |= _plain(result).keys() - given.keys() - self.used.keys()
        return result

    def undo(self) -> None:
        """Puts values back, the last first."""
        for storage, before in reversed(self._before):
            storage.copy_(before)
        self._before.clear()

    def _note_written(self, changed: dict[int, torch.Tensor]) -> None:
        for key, one in changed.items():
            if key in self._made or key in self.written:
                continue
            self.written.add(key)
            if self._restores:
                self._before.append((one.untyped_storage(), one.untyped_storage().clone()))


def _plain(values: Any) -> dict[int, torch.Tensor]:
    return {storage_key(one): one for one in tensors(values) if one.layout == torch.strided}
