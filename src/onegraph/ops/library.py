"""The torch library `onegraph`, and how an op gets into it.

An op is defined with a reference in plain PyTorch, for any device. Targets have faster ones for their own, which lie
above this package and are put in with `implement` (see `op_kernels.py`).

Through `torch.library.Library` and not `custom_op`: the latter adds about 20 microseconds to every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from onegraph.torch_compat.operators import dispatcher_is_watched

LIBRARY = torch.library.Library("onegraph", "DEF")

_with_out: list[Any] = []
_implemented: dict[tuple[str, str], Callable[..., Any]] = {}
_by_values: set[str] = set()
_functions: dict[tuple[str, str], Callable[..., Any]] = {}
"""By overload and dispatch key, which is empty for what stands for all devices."""


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    layout: torch.Tag = torch.Tag.needs_fixed_stride_order,
    *,
    by_values: bool = False,
) -> None:
    """Registers an op for all devices, with the function that stands for it while shapes are traced.

    `layout` says in which strides compiled code may hand inputs over: as eager does, or as it likes. `by_values` as in
    `decides_by_values`.
    """
    if by_values:
        _by_values.add(f"{LIBRARY.ns}::{schema.split('(', 1)[0]}")
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(layout,))
    _register(name, implementation)
    torch.library.register_fake(f"onegraph::{name}", fake, lib=LIBRARY)


def define_out(schema: str) -> None:
    """Gives a defined op of one result an overload `out`, which writes the result into memory that it is given.

    Compiled code calls it, so that the result lies in planned memory. The schema is the op's, `linear(Tensor x) ->
    Tensor`, without defaults.
    """
    name, arguments = schema.removesuffix(") -> Tensor").split("(", 1)
    op = getattr(getattr(torch.ops, LIBRARY.ns), name).default

    def out_of(*args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(op(*args))

    LIBRARY.define(f"{name}.out({arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    _register(f"{name}.out", out_of)
    _with_out.append(op)


def ops_with_out() -> tuple[Any, ...]:
    """The ops (OpOverloads) that `define_out` has given an overload."""
    return tuple(_with_out)


def implement(name: str, dispatch_key: str, implementation: Callable[..., Any]) -> None:
    """Puts a device's implementation before the one that `define` got; torch's dispatcher picks it by dispatch key.

    For the process's life, and once for each op and key. One with a result takes `out` too, memory that it may use for
    the result, which the dispatcher never gives it. While shapes are traced, the fake stands for it as before.
    """
    _register(name, implementation, dispatch_key)
    _implemented[name, dispatch_key] = implementation
    if any(op._schema.name == f"{LIBRARY.ns}::{name}" for op in _with_out):

        def out_of(*args: Any, out: torch.Tensor) -> torch.Tensor:
            result = implementation(*args, out=out)
            return out if result is out else out.copy_(result)

        _register(f"{name}.out", out_of, dispatch_key)


def _register(overload: str, function: Callable[..., Any], dispatch_key: str = "") -> None:
    LIBRARY.impl(overload, function, dispatch_key or "CompositeExplicitAutograd")
    _functions[overload, dispatch_key] = function


def decides_by_values(op: Any) -> bool:
    """Whether an op of ours reads values in Python to see what there is to compute: each call has to run as a whole."""
    return op.name().partition(".")[0] in _by_values


def function_of(op: Any, dispatch_key: str) -> Callable[..., Any] | None:
    """What the dispatcher calls for an overload of an op of ours, with plain tensors; None for another's.

    Without a dispatch key it is the reference.
    """
    namespace, _, overload = op.name().partition("::")
    if namespace != LIBRARY.ns:
        return None
    return _functions.get((overload, dispatch_key)) or _functions.get((overload, ""))


def implementation(name: str, dispatch_key: str) -> Callable[..., Any] | None:
    """What `implement` has put there: what the dispatcher calls for plain tensors of that device."""
    return _implemented.get((name, dispatch_key))


class OutFunctions:
    """The ops with an overload `out` as plain functions for a device: `functions.linear(x, weight, bias, out=memory)`.

    Each calls what the dispatcher would pick, without the dispatcher, which takes several microseconds; while something
    listens there (a profiler, a dispatch mode), the op goes through it.
    """

    def __init__(self, dispatch_key: str) -> None:
        self._dispatch_key = dispatch_key

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor]:
        dispatched = getattr(getattr(torch.ops, LIBRARY.ns), name).out
        function = implementation(name, self._dispatch_key)

        def call(*args: Any, out: torch.Tensor) -> torch.Tensor:
            if function is None or dispatcher_is_watched():
                return dispatched(*args, out=out)
            result = function(*args, out=out)
            return out if result is out else out.copy_(result)

        setattr(self, name, call)
        return call
