"""Which Python function Dynamo traces for a callable, without importing Dynamo: a warm start asks, and traces nothing.

The rules are those of `torch._dynamo.convert_frame.get_traced_fn`; a test compares the two.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def traced_function(callable_: Any) -> tuple[Any, Any]:
    """What would be traced for a module, method or function, and its `self` or None.

    Raises RuntimeError for another kind of callable, and AttributeError for a method of a C type.
    """
    callable_ = python_callable(callable_)
    if isinstance(callable_, torch.nn.Module):
        callable_ = _called(callable_)
    if hasattr(callable_, "__self__"):
        return callable_.__func__, callable_.__self__
    if isinstance(callable_, types.FunctionType):
        return callable_, None
    raise RuntimeError(f"a {type(callable_).__name__} has no Python code")


def _called(module: torch.nn.Module) -> Any:
    """The forward, where `module(...)` does nothing else."""
    hooked = any(getattr(module, name) for name in _HOOKS) or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
    forward = getattr(module.forward, "__func__", module.forward)
    call = getattr(module.__call__, "__func__", module.__call__)
    if not hooked and forward != torch.nn.Module.forward and call == torch.nn.Module.__call__:
        return module.forward
    return module._call_impl if isinstance(module, torch.fx.GraphModule) else module.__call__


def python_callable(callable_: Any) -> Any:
    """The callable, or its `__call__` where there is no Python function in it: an object, a partial as forward."""
    if isinstance(callable_, torch.nn.Module):
        return callable_ if _is_python(callable_.forward) else callable_.__call__
    if isinstance(callable_, type) or _is_python(callable_):
        return callable_
    called = getattr(callable_, "__call__", None)  # noqa: B004 - its value is what is asked for
    return called if _is_python(called) else callable_


def _is_python(callable_: Any) -> bool:
    return isinstance(getattr(callable_, "__func__", callable_), types.FunctionType)
