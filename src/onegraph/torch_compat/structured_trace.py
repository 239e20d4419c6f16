"""Entries of onegraph's own in torch's structured trace (TORCH_TRACE), which tlparse renders as files.

Costs nothing while no trace is being written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch._logging._internal import trace_log, trace_structured


def trace_is_written() -> bool:
    """Whether anybody asked for a trace: torch has a handler in any case, and tells by its folder."""
    return any(getattr(handler, "root_dir", "") is not None for handler in trace_log.handlers)


def trace_text(name: str, text: Callable[[], str]) -> None:
    """Adds a text artifact `onegraph_<name>`; `text` is only called while a trace is being written."""
    if trace_is_written():
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"onegraph_{name}", "encoding": "string"},
            payload_fn=text,
        )


def trace_json(name: str, facts: Callable[[], Any]) -> None:
    """Adds a JSON artifact `onegraph_<name>`."""
    if trace_is_written():
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"onegraph_{name}", "encoding": "json"},
            payload_fn=lambda: json.dumps(facts(), indent=1, default=str),
        )
