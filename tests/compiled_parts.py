"""What a compiled model runs, for tests that plant something there."""

import sys
from typing import Any

EAGERS_BITS = {"select_linear_kernels": False}
"""Passes after which a graph that runs op by op gives eager's results to the bit."""


def piece_callables(compiled: Any) -> list[list[Any]]:
    """For each region of sizes the callables of the pieces, in the list from which the plan's function takes them."""
    functions = _functions(compiled._current.entry)
    plan = next(function for function in functions if "__regions" in function.__globals__)
    found: list[list[Any]] = plan.__globals__["__regions"]
    return found


def _functions(function: Any) -> list[Any]:
    """The function and those that it calls, through closures, partials and globals of generated code."""
    found: list[Any] = []
    queue = [function]
    while queue:
        one = queue.pop()
        one = getattr(one, "func", one)
        if not hasattr(one, "__code__") or one in found:
            continue
        found.append(one)
        queue += [cell.cell_contents for cell in one.__closure__ or () if callable(cell.cell_contents)]
        if one.__code__.co_filename.startswith("<onegraph") or "__compiled_fn" in str(one.__code__.co_names):
            queue += [one.__globals__[name] for name in one.__code__.co_names if callable(one.__globals__.get(name))]
    return found


def plan_call(compiled: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
    """The plan's function, and what it is called with when the compiled model is called: weights, sizes, tensors."""
    functions = _functions(compiled._current.entry)
    plan = next(function for function in functions if "__regions" in function.__globals__)
    given: list[tuple[Any, ...]] = []

    def look(frame: Any, event: str, value: Any) -> None:
        code = frame.f_code
        if event == "call" and code is plan.__code__:
            given.append(tuple(frame.f_locals[name] for name in code.co_varnames[: code.co_argcount]))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        compiled(*args, **kwargs)
    finally:
        sys.setprofile(before)
    return plan, given[0]
