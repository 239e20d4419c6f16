"""Entries of onegraph's own in torch's structured trace (TORCH_TRACE), which tlparse renders as files.

Costs nothing while no trace is being written, and needs no Dynamo: a warm start is traced without it. All entries have
a compile id: that of the compile they are written in, else that of the latest one.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from torch._guards import CompileContext, CompileId, compile_context
from torch._logging import structured
from torch._logging._internal import trace_log, trace_structured


class _CompileIds:
    """The numbers of compiles in torch's books. Dynamo counts them once it is imported, and goes on from ours."""

    latest: CompileId | None = None

    def new(self) -> CompileId:
        number = 0 if self.latest is None else (self.latest.frame_id or 0) + 1
        dynamo: Any = sys.modules.get("torch._dynamo.convert_frame")
        if dynamo is None:
            self.latest = CompileId(frame_id=number, frame_compile_id=0)
        else:
            dynamo.FRAME_COUNTER = max(dynamo.FRAME_COUNTER, number)
            self.latest = dynamo.get_compile_id({})
        return self.latest


_ids = _CompileIds()


def new_compile_context() -> contextlib.AbstractContextManager[Any]:
    """Inside, what torch writes into its trace and its logs belongs to a compile with a number of its own."""
    scope: contextlib.AbstractContextManager[Any] = compile_context(CompileContext(_ids.new()))
    return scope


def latest_compile() -> Any:
    """The compile whose number was given last; None where there was none."""
    return _ids.latest


@contextlib.contextmanager
def written_for(compile_id: Any) -> Iterator[None]:
    """Inside, entries belong to this compile, a value of `latest_compile`."""
    with contextlib.nullcontext() if compile_id is None else compile_context(CompileContext(compile_id)):
        yield


def first_attempt() -> None:
    """Has what follows belong to the compile itself, where Dynamo has traced more than once: tlparse has a folder and
    a page for each attempt, and shows guards on the first one's page alone."""
    context = CompileContext.try_get()
    if context is not None:
        context.attempt = 0


@contextlib.contextmanager
def traced_without_dynamo(name: str, seconds: float, num_ops: int) -> Iterator[None]:
    """A compile in torch's books for what was loaded, which took `seconds` until now. Dynamo isn't imported."""
    with new_compile_context():
        yield
        if trace_is_written():
            metrics = {
                "co_name": name,
                "start_time": time.time() - seconds,
                "entire_frame_compile_time_s": seconds,
                "graph_op_count": num_ops,
                "restart_reasons": [],
            }
            trace_structured("compilation_metrics", metadata_fn=lambda: metrics)


def trace_is_written() -> bool:
    """Whether anybody asked for a trace: torch has a handler in any case, and tells by its folder."""
    return any(getattr(handler, "root_dir", "") is not None for handler in trace_log.handlers)


def trace_text(name: str, text: Callable[[], str]) -> None:
    """Adds a text artifact `onegraph_<name>`; `text` is only called while a trace is being written."""
    _trace("artifact", lambda: {"name": f"onegraph_{name}", "encoding": "string"}, text)


def trace_json(name: str, facts: Callable[[], Any]) -> None:
    """Adds a JSON artifact `onegraph_<name>`."""
    metadata = {"name": f"onegraph_{name}", "encoding": "json"}
    _trace("artifact", lambda: metadata, lambda: json.dumps(facts(), indent=1, default=str))


def trace_link(name: str, url: str) -> None:
    """Adds a link, which tlparse lists among the files of the compile."""
    _trace("link", lambda: {"name": name, "url": url})


def trace_constraint(expr: str, user: str | None, framework: str | None, source_line: str | None) -> None:
    """Adds a condition on sizes to tlparse's page `compilation_metrics`, while the compile is under way.

    `user` and `framework` are `file:line`. It stands in the table of guards, which is the one that shows expressions.
    """
    _trace(
        "guard_added_fast",
        lambda: {"expr": expr, "user_stack": _frames(user, source_line), "stack": _frames(framework, None)},
    )


def _trace(kind: str, metadata: Callable[[], dict[str, Any]], payload: Callable[[], str | None] = lambda: None) -> None:
    """Writes an entry of the compile that is under way, or else of the latest one."""
    if not trace_is_written():
        return
    with contextlib.ExitStack() as scope:
        if CompileContext.current_trace_id() is None:
            scope.enter_context(compile_context(CompileContext(_ids.latest or _ids.new())))
        trace_structured(kind, metadata_fn=metadata, payload_fn=payload)


def _frames(place: str | None, line: str | None) -> list[dict[str, Any]]:
    filename, _, number = (place or "").partition(" ")[0].rpartition(":")
    if not number.isdigit():
        return []
    frame = traceback.FrameSummary(filename, int(number), "the model", line=line or "")
    frames: list[dict[str, Any]] = structured.from_traceback([frame])
    return frames
