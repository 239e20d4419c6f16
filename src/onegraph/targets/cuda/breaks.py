"""Calls between the graphs of one recording: those of functions that are declared eager breaks.

A call is noted when the recorded code runs for the first time. When that is captured, nothing runs: the call's results
are those of the first time. A replay calls the function on the captured arguments, and copies what it returns to where
these results lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from onegraph.errors import RecordingError
from onegraph.ir.recording import NotRecordableError
from onegraph.torch_compat import pytree
from onegraph.torch_compat.raw_tensors import unowned_storage
from onegraph.torch_compat.recordable import storage_key, tensors

Inputs = Mapping[int, torch.Tensor]
"""Tensors that belong to somebody else, by their storages' keys."""


def named(function: Callable[..., Any]) -> str:
    """A function as errors name it."""
    return f"{function.__module__}.{function.__qualname__}"


@dataclass(frozen=True)
class FirstCall:
    """A call of `function` that has run; `given` are the tensors among its arguments, `results` what it returned."""

    function: Callable[..., Any]
    given: tuple[torch.Tensor, ...]
    results: Any

    @classmethod
    def of(cls, function: Callable[..., Any], args: Any, kwargs: Any, results: Any) -> FirstCall:
        """Raises NotRecordableError for results that Python could decide by."""
        for leaf in pytree.tree_leaves(results):
            if not isinstance(leaf, torch.Tensor | None) or (leaf is not None and leaf.layout != torch.strided):
                why = f"is an eager break that returns a {type(leaf).__name__}, where only tensors can be fixed memory"
                raise NotRecordableError("host_code", named(function), why)
        return cls(function, tuple(tensors((args, kwargs))), results)

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [*self.given, *tensors(self.results)]

    def results_of(self, args: Any, kwargs: Any) -> Any:
        """The results for the same call on other tensors: what showed an argument's memory shows the new one's."""
        given = tensors((args, kwargs))
        if len(given) != len(self.given):
            raise NotRecordableError("host_code", named(self.function), "is called otherwise the second time")
        pairs = {storage_key(old): (old, new) for old, new in zip(self.given, given, strict=True) if _is_plain(old)}

        def moved(result: Any) -> Any:
            if not isinstance(result, torch.Tensor) or storage_key(result) not in pairs:
                return result
            old, new = pairs[storage_key(result)]
            num_bytes = _begin(new) + _begin(result) - _begin(old)
            return _view(result, new.untyped_storage(), num_bytes // result.element_size())

        return pytree.tree_map(moved, self.results)


class EagerCall:
    """A call that each replay makes, on tensors that stay where they are."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, results: Any, inputs: Inputs) -> None:
        self.name = named(function)
        hold = partial(_held, inputs=inputs)
        self._function = function
        self._args, self._kwargs = pytree.tree_map(hold, (args, kwargs))
        self._statics, self._spec = pytree.tree_flatten(pytree.tree_map(hold, results))

    def __call__(self) -> None:
        """Raises RecordingError for results of other sizes than those that the next graph reads."""
        results, spec = pytree.tree_flatten(self._function(*self._args, **self._kwargs))
        if spec != self._spec:
            raise self._other("another structure")
        for static, new in zip(self._statics, results, strict=True):
            if not isinstance(static, torch.Tensor) or not isinstance(new, torch.Tensor):
                if static is not new:
                    raise self._other(f"a {type(new).__name__} in place of a {type(static).__name__}")
            elif new.shape != static.shape or new.dtype is not static.dtype:
                told = (f"{list(one.shape)} of {one.dtype}" for one in (new, static))
                raise self._other(" in place of ".join(told))
            elif new.data_ptr() != static.data_ptr() or new.stride() != static.stride():
                static.copy_(new)

    def _other(self, what: str) -> RecordingError:
        return RecordingError(
            f"{self.name}, an eager break, has returned {what}, and what follows it was recorded for that",
            where="a replay",
            hint="return tensors of the same sizes for each size of the inputs, or give cudagraph_mode=NONE",
            tensor=self.name,
        )


def inputs_by_storage(inputs: Sequence[torch.Tensor]) -> Inputs:
    """Those with plain memory."""
    return {storage_key(one): one for one in inputs if _is_plain(one)}


def _is_plain(tensor: torch.Tensor) -> bool:
    return bool(tensor.layout == torch.strided)


def _held(value: Any, *, inputs: Inputs) -> Any:
    """Another tensor over somebody else's memory, which doesn't keep it alive; the tensor itself otherwise."""
    if not isinstance(value, torch.Tensor) or not _is_plain(value) or storage_key(value) not in inputs:
        return value
    return _view(value, unowned_storage(value), value.storage_offset())


def _begin(tensor: torch.Tensor) -> int:
    """Bytes of its storage before its first element."""
    return int(tensor.storage_offset() * tensor.element_size())


def _view(like: torch.Tensor, storage: torch.UntypedStorage, offset: int) -> torch.Tensor:
    made = torch.empty(0, dtype=like.dtype, device=like.device)
    return made.set_(storage, offset, like.size(), like.stride())  # type: ignore[call-overload]
