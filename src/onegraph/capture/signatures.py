"""How a call reaches the function that Dynamo traces: directly, through a decorator, or through `__call__`."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.errors import CaptureError
from onegraph.torch_compat import dynamo


@dataclass(frozen=True)
class CallSignature:
    """How a call reaches the traced function.

    `written` is the signature that people know, by whose names they declare dims; `traced` is that of the function
    which Dynamo traces. They differ where a decorator or `Module.__call__` takes `*args, **kwargs` and hands them on.
    Neither has the function's `self`. Where that is the first of its `*args`, `self_in_rest` names these.
    """

    written: inspect.Signature
    traced: inspect.Signature
    self_in_rest: str = ""


HANDED_ON = inspect.signature(lambda *args, **kwargs: None)


def traced_function(module: Any) -> tuple[Any, Any]:
    """The Python function that is traced, and the object that is its `self`, or None.

    Raises CaptureError for what isn't a module, a method or a Python function.
    """
    try:
        function, owner = dynamo.traced_function(module)
    except (RuntimeError, AttributeError) as error:
        raise CaptureError(
            f"{module!r:.80} can't be captured: it is a {type(module).__name__}",
            hint="pass an nn.Module, a method, a Python function, or an object with a __call__ in Python",
        ) from error
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise CaptureError(
            f"{function.__qualname__} can't be captured: its body runs when its result is iterated or awaited",
            where=f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}",
            hint="compile the function that computes one result",
        )
    return function, owner


def call_signature(module: Any) -> CallSignature:
    """How a call of `module` reaches the function that is traced. Raises CaptureError as `traced_function`."""
    function, owner = traced_function(module)
    if isinstance(module, torch.nn.Module) and function is not getattr(module.forward, "__func__", module.forward):
        return CallSignature(inspect.signature(module.forward), HANDED_ON)  # through __call__ and its hooks
    if owner is None:
        return CallSignature(inspect.signature(function), inspect.signature(function, follow_wrapped=False))
    written = inspect.signature(types.MethodType(function, owner))
    own = inspect.signature(function, follow_wrapped=False)
    first = next(iter(own.parameters.values()))
    if first.kind is first.VAR_POSITIONAL:
        return CallSignature(written, own, self_in_rest=first.name)
    return CallSignature(written, own.replace(parameters=list(own.parameters.values())[1:]))
