"""The runtime: a straight-line Python function printed from an ExecutionPlan.

Takes a plan and a callable for each piece, which takes a list of the piece's inputs. Gives a function of the plan's
inputs, flat. The source is registered with linecache, so that tracebacks show it and pdb steps through it.
"""

from __future__ import annotations

import hashlib
import linecache
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from onegraph.ir.plan import ExecutionPlan, PlanCall

_FILENAME = "<onegraph plan "


def plan_source(plan: ExecutionPlan) -> str:
    """The function's text. `__piece_3` is the callable of piece 3."""
    lines = [f"def run({', '.join(plan.inputs)}):"]
    for call in plan.calls:
        lines += [f"    {line}" for line in _call_lines(call, set(plan.inputs))]
    results = ", ".join(one if isinstance(one, str) else repr(one) for one in plan.results)
    lines.append(f"    return ({results}{',' if len(plan.results) == 1 else ''})")
    return "\n".join(lines) + "\n"


def _call_lines(call: PlanCall, parameters: set[str]) -> list[str]:
    """The call's inputs go over in a list, which the piece empties: what ends inside of it is freed there."""
    comment = f"  # {call.comment}" if call.comment else ""
    lines = [f"__args = [{', '.join(call.inputs)}]{comment}"]
    ends = [name for name in call.frees if name in call.inputs and name not in parameters]
    if ends:
        lines.append(f"del {', '.join(ends)}")
    outputs = ", ".join(call.outputs) + ("," if len(call.outputs) == 1 else "")
    lines.append(f"{outputs} = __piece_{call.piece}(__args)" if outputs else f"__piece_{call.piece}(__args)")
    unused = [name for name in call.frees if name in call.outputs]
    if unused:
        lines.append(f"del {', '.join(unused)}")
    return lines


def plan_function(plan: ExecutionPlan, pieces: Mapping[int, Callable[[list[Any]], Any]]) -> Callable[..., Any]:
    """The function that calls `pieces`, by their index."""
    source = plan_source(plan)
    filename = f"{_FILENAME} {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {f"__piece_{index}": call for index, call in pieces.items()}
    exec(compile(source, filename, "exec"), namespace)  # noqa: S102 - our own text
    function: Callable[..., Any] = namespace["run"]
    return function


def replace_piece(function: Callable[..., Any], index: int, call: Callable[[list[Any]], Any]) -> None:
    """From the next call on, `function`, made by `plan_function`, calls `call` for the piece."""
    function.__globals__[f"__piece_{index}"] = call


def failed_piece(error: BaseException) -> int | None:
    """The piece that the error was raised in; None where it wasn't raised inside of a plan's function."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(_FILENAME):
            called = re.search(r"__piece_(\d+)\(", frame.line or "")
            return int(called[1]) if called else None
    return None
