"""What a compiled model runs, for tests that plant something there."""

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
