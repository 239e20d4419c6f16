"""An operator's call as a function of nothing, by the shortest way there is in Python.

Torch's own functions, such as `torch.mm`, reach an operator in a third of the time that the operator's object takes.
They are overloaded: which operator they reach with these arguments is seen with a mode that stops it there.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onegraph.torch_compat import pytree
from onegraph.torch_compat.operators import named_arguments

_TORCHS = "aten"
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType)


def operator_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    """Calls the overload with these arguments, below autograd."""
    asked = _Reached(func, tuple(args), kwargs)
    name = func._schema.name.partition("::")[2]
    places = (torch._C._VariableFunctions, torch.Tensor, torch._C._nn) if func.namespace == _TORCHS else ()
    for place in places:
        function = getattr(place, name, None)
        if isinstance(function, _BUILTIN):
            call = partial(function, *args, **kwargs)
            if asked.is_same(_reached(call)):
                return call
    return partial(func, *args, **kwargs)


class _Reached(Exception):  # noqa: N818 - it carries a call
    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.func = func
        defaults = {one.name: one.default_value for one in func._schema.arguments if one.has_default_value()}
        self.leaves, self.form = pytree.tree_flatten({**defaults, **named_arguments(func, args, kwargs)})

    def is_same(self, other: _Reached | None) -> bool:
        """Whether it is the same operator with the same tensors and numbers."""
        if other is None or other.func is not self.func or other.form != self.form:
            return False
        return all(
            ours is theirs if isinstance(ours, torch.Tensor) else type(ours) is type(theirs) and ours == theirs
            for ours, theirs in zip(self.leaves, other.leaves, strict=True)
        )


class _Stop(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Reached(func, tuple(args), kwargs or {})


def _reached(call: Callable[[], Any]) -> _Reached | None:
    """The first operator that a function calls, which doesn't run."""
    try:
        with torch.inference_mode(), torch._C._DisableAutocast(), torch._C.DisableTorchFunction(), _Stop():
            call()
    except _Reached as reached:
        return reached
    except (RuntimeError, TypeError, ValueError):
        pass
    return None
