"""The ledger: everything that a captured graph assumes about its inputs, shapes and Python state, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onegraph.ir.source_text import SourceFile

CheckedWhen = Literal["call", "event", "load", "never"]
Effect = Literal["proven", "narrows", "split"]


@dataclass(frozen=True)
class InputEntry:
    """A fact about one argument, checked on every call: `path` in the caller's terms, such as `caches[0]`."""

    path: str
    fact: str
    value: str


@dataclass(frozen=True)
class ShapeEntry:
    """A condition on the dynamic dims that some stage came to rely on.

    `expr` is in the names of the declared dims; `user` and `framework` are `file:line` places; `effect` says
    whether it holds over the whole declared range (`proven`) or cuts it (`narrows`).
    """

    expr: str
    stage: str
    effect: Effect
    user: str | None = None
    framework: str | None = None
    source_line: str | None = None

    def to_dict(self) -> dict[str, object]:
        return {
            "expr": self.expr,
            "user": self.user,
            "framework": self.framework,
            "stage": self.stage,
            "effect": self.effect,
        }


@dataclass(frozen=True)
class StateEntry:
    """A value of Python or torch state that was read while tracing, in the user's terms (`self.layers.0.scale`).

    `checked` says when it is compared again: on every `call`, on an `event` that the module's owner tells, at
    `load` by another process, or `never`, where the user promised that nothing changes (`freeze`). `portable` says
    whether `value` means the same in another process; an object is told by its identity alone in this one.
    """

    what: str
    value: str
    checked: CheckedWhen = "call"
    user: str | None = None
    portable: bool = True

    def to_dict(self) -> dict[str, object]:
        return {"what": self.what, "value": self.value, "checked": self.checked, "user": self.user}


@dataclass(frozen=True)
class LedgerCheck:
    """A fact of a recorded ledger, compared in another process. It may be another one in the same words."""

    what: str
    recorded: str | None
    now: str | None
    holds: bool

    def to_dict(self) -> dict[str, object]:
        return {"what": self.what, "recorded": self.recorded, "now": self.now, "holds": self.holds}


@dataclass(frozen=True)
class StateRead:
    """How an entry is checked: `expression` over `names` reads the value now; `condition` on `{x}` says it changed."""

    entry: StateEntry
    expression: str
    condition: str
    names: Mapping[str, Any]
    describe: Callable[[Any], str]
    """A value in the words of the entry's `value`; never the contents of the environment."""


@dataclass(frozen=True)
class Ledger:
    """All that one trace assumes; `sources` are the files outside of torch whose functions were inlined."""

    inputs: tuple[InputEntry, ...] = ()
    shapes: tuple[ShapeEntry, ...] = ()
    state: tuple[StateEntry, ...] = ()
    sources: tuple[SourceFile, ...] = ()

    @property
    def unindexable(self) -> tuple[str, ...]:
        """Why no other process may take this trace for its own without tracing; empty if it may."""
        return tuple(
            [f"{entry.what} is {entry.value}, of this process alone" for entry in self.state if not entry.portable]
            + [f"{source.path} has changed since it was imported" for source in self.sources if not source.as_loaded]
        )

    def to_dict(self) -> dict[str, object]:
        return {
            "inputs": [{"path": e.path, "fact": e.fact, "value": e.value} for e in self.inputs],
            "shape": [entry.to_dict() for entry in self.shapes],
            "state": [entry.to_dict() for entry in self.state],
        }
