"""The runtime: a straight-line Python function printed from an ExecutionPlan.

Takes a plan, and for each region of sizes a callable for each piece, which takes a list of the piece's inputs. Gives
a function of the plan's inputs, flat. The source is registered with linecache, so that tracebacks show it and pdb
steps through it.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import linecache
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from onegraph.ir.artifact import PieceCallable
from onegraph.ir.plan import ExecutionPlan, PlanCall
from onegraph.plan.memory import Block, StepMemory

_FILENAME = "<onegraph plan "


def plan_source(
    plan: ExecutionPlan, num_regions: int = 1, sizes: tuple[str, ...] | None = None, *, is_timed: bool = False
) -> str:
    """The function's text. `pieces[3]` is the callable of piece 3, in the region that has the call's size.

    `sizes` are the inputs from which the places of intermediate values follow; None where each piece allocates. With
    `is_timed` each piece's call stands between calls of `__enter(3)` and `__leave()`.
    """
    lines = [f"def run({', '.join(plan.inputs)}):"]
    region = "0" if num_regions == 1 else f"__region_of({plan.size})"
    if sizes is None:
        lines.append(f"    __pieces = __regions[{region}]")
    else:
        lines.append("    __block = __memory.take()")
        lines.append(f"    __pieces = __block.pieces({', '.join((region, *sizes))})")
    for call in plan.calls:
        lines += [f"    {line}" for line in _call_lines(call, set(plan.inputs), is_timed)]
    if sizes is not None:
        lines.append("    __memory.give(__block)")
    results = ", ".join(one if isinstance(one, str) else repr(one) for one in plan.results)
    lines.append(f"    return ({results}{',' if len(plan.results) == 1 else ''})")
    return "\n".join(lines) + "\n"


def _call_lines(call: PlanCall, parameters: set[str], is_timed: bool) -> list[str]:
    """The call's inputs go over in a list, which the piece empties: what ends inside of it is freed there."""
    comment = f"  # {call.comment}" if call.comment else ""
    lines = [f"__args = [{', '.join(call.inputs)}]{comment}"]
    ends = [name for name in call.frees if name in call.inputs and name not in parameters]
    if ends:
        lines.append(f"del {', '.join(ends)}")
    outputs = ", ".join(call.outputs) + ("," if len(call.outputs) == 1 else "")
    call_code = f"__pieces[{call.piece}](__args)"
    called = f"{outputs} = {call_code}" if outputs else call_code
    lines += [f"__enter({call.piece})", called, "__leave()"] if is_timed else [called]
    unused = [name for name in call.frees if name in call.outputs]
    if unused:
        lines.append(f"del {', '.join(unused)}")
    return lines


def plan_function(
    plan: ExecutionPlan,
    regions: Sequence[Sequence[PieceCallable]],
    region_of: Callable[[int], int] | None = None,
    sizes: tuple[str, ...] | None = None,
) -> Callable[..., Any]:
    """The function that calls the pieces: those of `regions[region_of(size)]`, where there is more than one region.

    `sizes` as for `plan_source`.
    """
    pieces = [list(one) for one in regions]
    namespace: dict[str, Any] = {"__regions": pieces, "__region_of": region_of, "__plan": plan, "__sizes": sizes}
    if sizes is not None:
        namespace["__memory"] = StepMemory(functools.partial(Block, plan, pieces, sizes))
    return _defined(plan_source(plan, len(regions), sizes), namespace)


def _defined(source: str, namespace: dict[str, Any]) -> Callable[..., Any]:
    filename = f"{_FILENAME} {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)  # noqa: S102 - our own text
    function: Callable[..., Any] = namespace["run"]
    return function


@contextmanager
def timed_pieces(function: Callable[..., Any], enter: Callable[[int], Any], leave: Callable[[], Any]) -> Iterator[None]:
    """Inside, a function made by `plan_function` calls `enter` with a piece's number before it runs it, then `leave`.

    It is the function itself, which others hold, with other code for a time: at other times nothing asks for timers.
    """
    names = function.__globals__
    source = plan_source(names["__plan"], len(names["__regions"]), names["__sizes"], is_timed=True)
    before, function.__code__ = function.__code__, _defined(source, {}).__code__
    names |= {"__enter": enter, "__leave": leave}
    try:
        yield
    finally:
        function.__code__ = before
        names |= {"__enter": lambda piece: None, "__leave": lambda: None}  # for a call that is still under way


def input_function(plan: ExecutionPlan, expressions: Sequence[str | None]) -> Callable[..., tuple[Any, ...]]:
    """A function of the plan's inputs that gives the values of expressions over them."""
    values = "".join(f"{one}, " for one in expressions)
    function: Callable[..., tuple[Any, ...]] = eval(f"lambda {', '.join(plan.inputs)}: ({values})")  # noqa: S307
    return function


def function_regions(function: Callable[..., Any]) -> list[list[PieceCallable]]:
    """The callables of a function made by `plan_function`, as they are now: `replace_piece` changes them."""
    regions: list[list[PieceCallable]] = function.__globals__["__regions"]
    return regions


def region_of(function: Callable[..., Any], size: int | None) -> int:
    """The index of the callables that a function made by `plan_function` calls at a size of the first dim."""
    finder = function.__globals__["__region_of"]
    return 0 if finder is None or size is None else int(finder(size))


def function_source(function: Callable[..., Any]) -> str:
    """The text of a function made by `plan_function`."""
    return "".join(linecache.getlines(function.__code__.co_filename))


def replace_piece(function: Callable[..., Any], region: int, index: int, call: PieceCallable) -> None:
    """From the next call on, `function`, made by `plan_function`, calls `call` for the piece in that region."""
    function_regions(function)[region][index] = call


def region_finder(boxes: Sequence[tuple[int, int]]) -> Callable[[int], int]:
    """A function from a size to the index of the first of the closed ranges that has it, by bisection.

    A size that none has raises AssertionError: the declared range was checked before.
    """
    edges = sorted({edge for least, most in boxes for edge in (least, most + 1)})
    found = [next((i for i, (least, most) in enumerate(boxes) if least <= edge <= most), None) for edge in edges]

    def region_of(size: int) -> int:
        place = bisect.bisect_right(edges, size) - 1
        region = found[place] if place >= 0 else None
        assert region is not None, f"no artifact is for the size {size}"
        return region

    return region_of


def failed_piece(error: BaseException) -> int | None:
    """The piece that the error was raised in; None where it wasn't raised inside of a plan's function."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(_FILENAME):
            called = re.search(r"__pieces\[(\d+)\]\(", frame.line or "")
            return int(called[1]) if called else None
    return None
