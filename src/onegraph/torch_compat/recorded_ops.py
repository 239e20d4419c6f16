"""What a thread has torch's dispatcher do, noted so that it can be done again, on the same tensors.

Takes the list that calls are noted in, and the tensors that belong to somebody else. Gives calls without Python but
their own: operators that write, and operators whose results are written over those of the first time. Views and
allocations aren't noted: their memory stays. What no repetition is right for raises NotRecordableError, before it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from onegraph.ir.recording import NotRecordableError
from onegraph.torch_compat import pytree
from onegraph.torch_compat.operator_calls import operator_call
from onegraph.torch_compat.operators import named_arguments, written_arguments
from onegraph.torch_compat.out_variants import out_variant
from onegraph.torch_compat.raw_tensors import unowned_storage
from onegraph.torch_compat.recordable import (
    ALLOCATORS,
    CONSTANT,
    CheckedOperators,
    Own,
    checked,
    runs_python,
    storage_key,
    tensors,
)

_recording: dict[int, RecordedOperators] = {}


@dataclass(frozen=True)
class OperatorCall:
    """An operator's call; `tensors` are those that it works on, apart from somebody else's."""

    name: str
    run: Callable[[], Any]
    tensors: tuple[torch.Tensor, ...]


@contextmanager
def operators_recorded(
    calls: list[Any], inputs: Sequence[torch.Tensor], own: Own, device: str, runs_as_whole: Callable[[Any], bool]
) -> Iterator[RecordedOperators]:
    """Inside, this thread's calls of operators run as always, and are appended to `calls` as OperatorCalls.

    The storages of `inputs` are somebody else's: they are found by address, and not kept alive. `own` and `device` are
    as for CheckedOperators; an operator that `runs_as_whole` is called again although it is implemented in Python.
    """
    watch = RecordedOperators(calls, inputs, own, device, runs_as_whole)
    thread = threading.get_ident()
    _recording[thread] = watch
    try:
        with checked(watch):
            yield watch
    finally:
        del _recording[thread]


def noted(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same function, for one that makes tensors without the dispatcher: a recording of its caller hears of them."""

    def call(*layout: Any) -> torch.Tensor:
        tensor = allocate(*layout)
        if _recording and (watch := _recording.get(threading.get_ident())) is not None:
            watch.made(tensor)
        return tensor

    return call


def without_autograd() -> AbstractContextManager[Any]:
    """Inside, operators run below autograd, as they were noted. `torch.inference_mode` takes ten times as long."""
    return torch._C._InferenceMode(True)  # type: ignore[no-any-return]


def without_autocast() -> AbstractContextManager[Any]:
    """Inside, operators compute in the dtypes that they are given, whatever the caller has switched on."""
    return torch._C._DisableAutocast()  # type: ignore[no-any-return]


class RecordedOperators(CheckedOperators):
    """See `operators_recorded`. Knows which memory was made inside."""

    def __init__(
        self,
        calls: list[Any],
        inputs: Sequence[torch.Tensor],
        own: Own,
        device: str,
        runs_as_whole: Callable[[Any], bool],
    ) -> None:
        super().__init__(own, device)
        self._runs_as_whole = runs_as_whole
        self._calls = calls
        plain = (one for one in inputs if one.layout == torch.strided)
        self._inputs: dict[int, Any] = {storage_key(one): one.untyped_storage() for one in plain}
        self._unowned: dict[int, Any] = {}
        self._made: dict[int, Any] = {}
        self._constants: set[int] = set()

    def is_input(self, tensor: torch.Tensor) -> bool:
        """Whether its memory is somebody else's."""
        return storage_key(tensor) in self._inputs

    def made(self, tensor: torch.Tensor) -> None:
        """Its memory is new."""
        self._made[storage_key(tensor)] = tensor.untyped_storage()

    def made_bytes(self, tensor: torch.Tensor) -> int:
        """The bytes of its storage, if that was made inside."""
        storage = self._made.get(storage_key(tensor))
        return 0 if storage is None else int(storage.nbytes())

    def is_scratch(self, tensor: torch.Tensor) -> bool:
        """Whether its memory was made inside, and is written again before it is read."""
        key = storage_key(tensor)
        return key in self._made and key not in self._constants

    def forget(self) -> None:
        """Lets go of all memory."""
        for known in (self._inputs, self._unowned, self._made):
            known.clear()

    def refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """As CheckedOperators, and what runs Python."""
        if runs_python(func) and not self._runs_as_whole(func):
            raise NotRecordableError("host_code", str(func), "is implemented in Python, which a replay doesn't run")
        super().refuse(func, args, kwargs)
        _refuse_without_memory(func, tensors((args, kwargs)))

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator, and notes it."""
        named = named_arguments(func, args, kwargs)
        written = tensors([named.get(name) for name in written_arguments(func)])
        before = [(one.untyped_storage(), one.untyped_storage().data_ptr()) for one in written]
        result = func(*args, **kwargs)
        if any(address and storage.data_ptr() != address for storage, address in before):
            raise NotRecordableError("moved_memory", str(func), "gave a tensor other memory than it had")
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        known = {storage_key(one) for one in tensors((args, kwargs))}
        leaves = pytree.tree_leaves(result)
        _refuse_without_memory(func, tensors(leaves))
        fresh = [
            (index, one)
            for index, one in enumerate(leaves)
            if isinstance(one, torch.Tensor) and storage_key(one) not in known
        ]
        for _, one in fresh:
            self.made(one)
        if func._schema.name == CONSTANT:
            self._note_constant(func, result)
        elif func._schema.name in ALLOCATORS or torch.Tag.inplace_view in func.tags:
            return
        elif fresh or written_arguments(func):
            self._append(func, args, kwargs, fresh)

    def _note_constant(self, func: Any, tensor: torch.Tensor) -> None:
        """Values of the host are put back, since later calls may write over them."""
        self.made(tensor)
        kept, values = self._held(tensor), tensor.clone()
        self.made(values)
        self._constants.add(storage_key(values))
        self._calls.append(OperatorCall(str(func), partial(kept.copy_, values), (kept, values)))

    def _append(self, func: Any, args: Any, kwargs: Any, fresh: list[tuple[int, torch.Tensor]]) -> None:
        held_args, held_kwargs = pytree.tree_map_only(torch.Tensor, self._held, (args, kwargs))
        targets = [(index, one.detach()) for index, one in fresh]
        run = None
        if targets and not written_arguments(func):
            run = out_variant(func, held_args, held_kwargs, [one for _, one in targets])
        if run is None:
            run = operator_call(func, held_args, held_kwargs)
            run = partial(_overwrite, run, targets) if targets else run
        kept = [one for one in tensors((args, kwargs)) if not self.is_input(one)]
        self._calls.append(OperatorCall(str(func), run, (*kept, *(one for _, one in targets))))

    def _held(self, tensor: torch.Tensor) -> torch.Tensor:
        """Another tensor over the same memory, which keeps its sizes; of somebody else's memory without owning it."""
        key = storage_key(tensor)
        if key not in self._inputs:
            return tensor.detach()
        if key not in self._unowned:
            self._unowned[key] = unowned_storage(tensor)
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return made.set_(self._unowned[key], tensor.storage_offset(), tensor.size(), tensor.stride())


def _overwrite(call: Callable[[], Any], targets: list[tuple[int, torch.Tensor]]) -> None:
    """Runs an operator, and copies its results over those that it had at first."""
    results = pytree.tree_leaves(call())
    for index, target in targets:
        target.copy_(results[index])


def _refuse_without_memory(func: Any, given: list[torch.Tensor]) -> None:
    for one in given:
        is_plain = one.layout == torch.strided and not (one.is_quantized or one.is_conj() or one.is_neg())
        if not is_plain or is_traceable_wrapper_subclass(one):
            raise NotRecordableError("unsafe_op", str(func), "works on a tensor that isn't plain memory")
