"""Modes that change operators under a block: computing in fp64, filling fresh memory, other functions in their place.

Takes nothing; used as context managers around an eager run. They keep nothing and change no module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onegraph.torch_compat import pytree

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
_ALLOCATORS = frozenset(
    {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
     "aten::empty_permuted"}
)  # fmt: skip


class InFloat64(TorchDispatchMode):
    """Operators take their floating inputs as fp64 and give fp64; a view stays a view, of its own dtype.

    An operator that writes into an argument computes in that argument's dtype, and one without an fp64 kernel in
    the narrowest dtype that it was given: these are their own reference.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        written = _written_dtype(func, args, kwargs)
        if written is not None:
            return func(*_cast(args, written), **_cast(kwargs, written))
        try:
            return func(*_widen(args), **_widen(kwargs))
        except (RuntimeError, NotImplementedError):
            narrowest = min(
                (t.dtype for t in pytree.tree_leaves((args, kwargs)) if _is_floating(t)),
                key=lambda dtype: dtype.itemsize,
                default=torch.float32,
            )
            narrowest = torch.float32 if narrowest is torch.float64 else narrowest
            return _widen(func(*_cast(args, narrowest), **_cast(kwargs, narrowest)))


class FilledMemory(TorchDispatchMode):
    """Newly allocated memory holds `value` (cast to its dtype) instead of what was there before."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _ALLOCATORS:
            result.fill_(self.value if result.is_floating_point() else int(self.value) % 2)
        return result


class Replaced(TorchDispatchMode):
    """Where `function_for(operator)` gives a function, that is called in place of the operator."""

    def __init__(self, function_for: Callable[[Any], Callable[..., Any] | None]) -> None:
        super().__init__()
        self._function_for = function_for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._function_for(func) or func)(*args, **(kwargs or {}))


def enters_autocast(node: torch.fx.Node) -> bool:
    """Whether a node of Dynamo's switches autocast on, with the same call that switches it off elsewhere."""
    return getattr(node.target, "__name__", "") == "_enter_autocast" and bool(node.args[2])


def is_transformed(value: torch.Tensor) -> bool:
    """Whether a tensor is wrapped by a transform of torch.func, such as vmap: it has no storage to ask for."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _widen(values: Any) -> Any:
    def wider(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(_WIDER[value.dtype]) if value.dtype in _WIDER else value
        return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value

    return pytree.tree_map(wider, values)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda v: v.to(dtype) if _is_floating(v) and v.dtype != dtype else v, values)


def _written_dtype(func: Any, args: Any, kwargs: Any) -> torch.dtype | None:
    """The dtype of the first floating argument that the operator writes into; None if it writes none."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if _is_floating(value):
                return value.dtype  # type: ignore[no-any-return]
    return None
