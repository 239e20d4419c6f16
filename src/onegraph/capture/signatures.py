"""How a call reaches the function that Dynamo traces: directly, through a decorator, or through `__call__`."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.errors import CaptureError
from onegraph.torch_compat import traced_function as torch_compat


@dataclass(frozen=True)
class CallSignature:
    """How a call reaches the traced function.

    `written` is the signature that people know, by whose names they declare dims; `traced` is that of the function
    which Dynamo traces. They differ where a decorator or `Module.__call__` takes `*args, **kwargs` and hands them on.
    Neither has the function's `self`. Where that is the first of its `*args`, `self_in_rest` names these.
    `may_differ` says that a call may fit `traced` alone, since a decorator may have arguments of its own.
    """

    written: inspect.Signature
    traced: inspect.Signature
    self_in_rest: str = ""
    may_differ: bool = True


def traced_function(module: Any) -> tuple[Any, Any]:
    """The Python function that is traced, and the object that is its `self`, or None.

    Raises CaptureError for what isn't a module, a method or a Python function.
    """
    try:
        function, owner = torch_compat.traced_function(module)
    except (RuntimeError, AttributeError) as error:
        raise CaptureError(
            f"{module!r:.80} can't be captured: it is a {type(module).__name__}",
            hint="pass an nn.Module, a method, a Python function, or an object with a __call__ in Python",
        ) from error
    if not isinstance(function, types.FunctionType):
        raise CaptureError(
            f"{module!r:.80} can't be captured: a {type(function).__name__} stands where its function should",
            hint="decorate with a function, and have it give a function",
        )
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
    own, rest = _without_self(inspect.signature(function, follow_wrapped=False), owner)
    if isinstance(module, torch.nn.Module) and function is not forward_of(module) and _takes_anything(own):
        try:
            written = inspect.signature(module.forward)
        except ValueError:  # an object in the method's place, which doesn't say
            written = own
        return CallSignature(written, own, rest, may_differ=function is not torch.nn.Module.__call__)
    return CallSignature(_without_self(inspect.signature(function), owner)[0], own, rest)


def forward_of(module: torch.nn.Module) -> Any:
    """The function behind `module.forward`."""
    return getattr(module.forward, "__func__", module.forward)


def _takes_anything(signature: inspect.Signature) -> bool:
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    return kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def _without_self(signature: inspect.Signature, owner: Any) -> tuple[inspect.Signature, str]:
    """The signature of a call, and the name of the `*args` that the function's `self` is the first of, if it is."""
    parameters = list(signature.parameters.values())
    if owner is None:
        return signature, ""
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return signature, parameters[0].name
    return signature.replace(parameters=parameters[1:]), ""
