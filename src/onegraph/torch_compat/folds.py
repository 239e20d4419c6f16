"""Calls that Dynamo runs while tracing and keeps the results of: neither inlined nor guarded.

Dynamo does so at a few sites, hooked here one by one: functions marked `assume_constant_result`, questions about
torch's state (`torch.is_autocast_enabled`), polyfilled functions of the standard library (`sys.getrecursionlimit`),
and questions to `importlib`. Calls whose result follows from their arguments alone (`math.floor(2.5)`) are left out.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._dynamo.variables import builtin, functions, nn_module
from torch._dynamo.variables import torch as torch_variables
from torch._guards import TracingContext

from onegraph.ir.traced import FoldedCall, FoldKind
from onegraph.torch_compat.shapes import is_torch_file

_PURE_IN_TORCH = frozenset(
    {
        torch._assert,
        torch._utils._get_device_index,
        torch.is_complex,
        torch.is_floating_point,
        torch.promote_types,
        torch.nn.functional._Reduction.get_enum,  # type: ignore[attr-defined]
    }
)
_OF_THE_INSTALLATION = (importlib.util.find_spec, importlib.metadata.version)
_STATE_OF_SYS = frozenset({"getrecursionlimit", "get_int_max_str_digits"})


@contextmanager
def folded_calls() -> Iterator[list[FoldedCall]]:
    """Collects the folded calls of the traces that are made inside, in order, each as often as it was run."""
    found: list[FoldedCall] = []

    def recorded(kind: FoldKind, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            found.append(FoldedCall(kind, function, args, kwargs, result, _user_line()))
            return result

        return run

    store_as_constant = functions.invoke_and_store_as_constant

    def stored(tx: Any, fn: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        marked = getattr(fn, "_dynamo_marked_constant", False)  # else a builtin on constants
        return store_as_constant(tx, recorded("declared", fn) if marked else fn, name, args, kwargs)

    def run_again(kind: Callable[[Any], FoldKind | None], call: Callable[..., Any]) -> Callable[..., Any]:
        """The variable's `call_function`; what it folds is run once more to be recorded."""

        @functools.wraps(call)
        def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
            result = call(self, tx, args, kwargs)
            folded = kind(self)
            if folded is not None and builtin.check_unspec_or_constant_args(args, kwargs):
                values = [value.as_python_constant() for value in args]
                named = {name: value.as_python_constant() for name, value in kwargs.items()}
                recorded(folded, _function_of(self))(*values, **named)
            return result

        return call_function

    with ExitStack() as hooks:
        for module in (functions, nn_module):
            _hook(hooks, module, "invoke_and_store_as_constant", stored)
        for variable, kind in (
            (torch_variables.TorchInGraphFunctionVariable, _kind_in_torch),
            (functions.PolyfilledFunctionVariable, _kind_of_polyfill),
            (functions.SkipFunctionVariable, _kind_of_skipped),
        ):
            _hook(hooks, variable, "call_function", run_again(kind, variable.call_function))
        yield found


def _hook(hooks: ExitStack, holder: Any, name: str, replacement: Callable[..., Any]) -> None:
    hooks.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, replacement)


def _function_of(variable: Any) -> Callable[..., Any]:
    return variable.fn if isinstance(variable, functions.PolyfilledFunctionVariable) else variable.value  # type: ignore[no-any-return]


def _kind_in_torch(variable: Any) -> FoldKind | None:
    function = variable.value
    pure = function in _PURE_IN_TORCH or getattr(function, "__module__", None) == "math"
    return "state" if variable.can_constant_fold_through() and not pure else None


def _kind_of_polyfill(variable: Any) -> FoldKind | None:
    """The polyfills that torch ships are pure but for two of `sys`; one that the user registered is his word."""
    if not variable.can_constant_fold_through():
        return None
    if getattr(variable.fn, "__module__", None) == "sys":
        return "state" if variable.fn.__name__ in _STATE_OF_SYS else None
    return None if is_torch_file(variable.traceable_fn.__code__.co_filename) else "declared"


def _kind_of_skipped(variable: Any) -> FoldKind | None:
    return "installation" if variable.value in _OF_THE_INSTALLATION else None


def _user_line() -> str | None:
    frames = list(TracingContext.extract_stack())
    frame = next((f for f in reversed(frames) if not is_torch_file(f.filename)), frames[-1] if frames else None)
    return None if frame is None else f"{frame.filename}:{frame.lineno}"
