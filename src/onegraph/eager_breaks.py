"""`onegraph.eager_break`: a function that isn't recorded, where the module that calls it is recorded uncompiled.

Takes a function; gives one that is called like it. While a thread records, it tells whoever listens there of the call
instead: the recording ends before it and goes on behind it, and each replay calls the function between the two.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from onegraph.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])
Listener = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called with the function and its arguments; gives the call's result."""

_listeners: dict[int, Listener] = {}


def eager_break(fn: Function) -> Function:
    """Declares that a function or method isn't recorded: `@onegraph.eager_break`.

    It is for modules that are recorded as they are (`mode=0` with `cudagraph_mode=FULL`), and for what a recording
    can't repeat: code of the host, a wait for the device, an op that can't be captured. Each replay calls it again,
    with the tensors and other arguments of the recorded call, and has its results copied to where those of the
    recorded call lie. So it returns tensors, or nested lists, tuples and dicts of tensors and None, of the same sizes
    each time for one size of the module's inputs; what else it takes is as it was when it was recorded.

    Where a graph is captured, the function is traced as if it weren't decorated: name an op of it in `splitting_ops`
    to have that run between pieces. Raises ConfigError for what isn't a function.
    """
    if not isinstance(fn, types.FunctionType):
        raise ConfigError(
            f"onegraph.eager_break takes a Python function, not {fn!r:.80}", hint="decorate a function or a method"
        )

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _listeners:
            return fn(*args, **kwargs)
        listener = _listeners.get(threading.get_ident())
        return fn(*args, **kwargs) if listener is None else listener(fn, args, kwargs)

    return call  # type: ignore[return-value]


@contextmanager
def breaks_heard_by(listener: Listener | None) -> Iterator[None]:
    """Inside, this thread's calls of such functions go to the listener; with None they are plain calls."""
    thread = threading.get_ident()
    before = _listeners.pop(thread, None)
    if listener is not None:
        _listeners[thread] = listener
    try:
        yield
    finally:
        _listeners.pop(thread, None)
        if before is not None:
            _listeners[thread] = before
