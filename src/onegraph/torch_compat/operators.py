"""The kinds of operators that stand in a graph, and what their schemas declare; torch has no public names for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "RecordingMode",
    "WriteRefusedError",
    "changed_arguments",
    "dispatcher_is_watched",
    "may_share",
    "named_arguments",
    "overload_for",
    "refuse_writes",
    "written_arguments",
]


def overload_for(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The overload (an OpOverload) that a call of a packet or overload runs."""
    if isinstance(op, OpOverload):
        return op
    names = op.overloads()
    if len(names) == 1:
        return getattr(op, names[0])
    return getattr(op, torch._C._jit_resolve_packet(op._qualified_op_name, *args, **kwargs))


def named_arguments(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an overload's call that were given, by their names in its schema."""
    names = [argument.name for argument in op._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def written_arguments(op: Any) -> frozenset[str]:
    """The names of the arguments that an overload's schema says are changed."""
    return frozenset(a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def may_share(op: Any, result: int, name: str) -> bool:
    """Whether the schema lets this result of an overload share memory with this argument.

    Python can't see the names in annotated lists, `Tensor(a)[]`: such a list may share with any annotated one.
    """
    returned = op._schema.returns[result].alias_info if result < len(op._schema.returns) else None
    given = next((a.alias_info for a in op._schema.arguments if a.name == name), None)
    if returned is None or given is None:
        return False
    ours, theirs = set(returned.before_set), set(given.before_set)
    return not ours or not theirs or bool(ours & theirs) or "*" in returned.after_set


class WriteRefusedError(Exception):
    """An operator was about to change `tensor`, and mustn't."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor


_UNDECLARED = frozenset({"running_mean", "running_var"})
"""What aten's older normalisations change without a word in their schemas."""


def changed_arguments(op: Any) -> frozenset[str]:
    """As `written_arguments`, with those that are changed without a word in the schema."""
    return written_arguments(op) | _UNDECLARED


class refuse_writes(TorchDispatchMode):  # noqa: N801 - used as a context manager
    """While in force, an op that changes a tensor in a storage of the given tensors doesn't run.

    Raises WriteRefusedError instead. Higher-order operators can't run inside.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.storages = {_storage(tensor) for tensor in tensors} - {None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = changed_arguments(func)
        for name, value in named_arguments(func, args, kwargs).items():
            for item in value if isinstance(value, list | tuple) and name in written else (value,):
                if name in written and isinstance(item, torch.Tensor) and _storage(item) in self.storages:
                    raise WriteRefusedError(item)
        return func(*args, **kwargs)


def _storage(tensor: torch.Tensor) -> int | None:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else None


class RecordingMode(TorchDispatchMode):
    """The base of modes that only note what runs, for which own ops needn't go through the dispatcher."""


def dispatcher_is_watched() -> bool:
    """Whether a profiler or a dispatch mode sees, or changes, what operators are called in this thread.

    A recording of ours doesn't count: it has ways of its own to see own ops.
    """
    num_modes = torch._C._len_torch_dispatch_stack()
    if num_modes and not all(isinstance(torch._C._get_dispatch_stack_at(i), RecordingMode) for i in range(num_modes)):
        return True
    return bool(torch._C._autograd._profiler_enabled())
