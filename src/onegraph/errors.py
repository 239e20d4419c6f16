"""Every error that onegraph raises for a user: what failed, where, and what to do, as one readable block.

Each class has a stable `code`, which is its anchor in docs/errors.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar


class OnegraphError(Exception):
    """The base of all. `message` says what failed with its values, `where` the place, `hint` the way out."""

    code: ClassVar[str] = "OG-ERROR"

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message, self.where, self.hint = message, where, hint
        lines = [f"[{self.code}] {message}"]
        if where:
            lines.append(f"  where: {where}")
        if hint:
            lines.append(f"  to do: {hint}")
        super().__init__("\n".join(lines))


class ConfigError(OnegraphError):
    """A setting, flag, variable or argument that is wrong, contradictory, or can't be honoured."""

    code = "OG-CONFIG"


class ModelError(OnegraphError):
    """A model that can't be loaded or served: files are missing, or its architecture isn't supported."""

    code = "OG-MODEL"


class InputContractError(OnegraphError):
    """A call whose inputs differ from the captured ones in more than a declared size."""

    code = "OG-INPUT"


class ShapeOutOfRangeError(OnegraphError):
    """A call with a size outside the range that was declared for it."""

    code = "OG-RANGE"


class CaptureError(OnegraphError):
    """A module that can't be captured as one graph; names the user's line and torch's hint."""

    code = "OG-CAPTURE"


class CustomOpError(CaptureError):
    """A custom op that does something else than its schema or its fake says, or that can't be made one."""

    code = "OG-CUSTOM-OP"


class ConstraintError(OnegraphError):
    """A model that works only for a part of the declared range. `constraints` are ledger entries."""

    code = "OG-CONSTRAINT"

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        constraints: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.constraints = constraints


class StateChangedError(OnegraphError):
    """Python state that the captured graph was made for has changed, and `on_state_change` is `error`.

    `changes` are pairs of a ledger entry and what stands there now, in words.
    """

    code = "OG-STATE"

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        changes: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.changes = changes


class CompileError(OnegraphError):
    """A piece that the compiler or the C++ toolchain failed on."""

    code = "OG-COMPILE"


class ArtifactError(OnegraphError):
    """The compile cache, or something in it, that can't be used."""

    code = "OG-ARTIFACT"


class RecordingError(OnegraphError):
    """A recording that may not be replayed. `tensor` names what moved or died."""

    code = "OG-RECORDING"

    def __init__(
        self, message: str, *, where: str | None = None, hint: str | None = None, tensor: str | None = None
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.tensor = tensor


class EngineError(OnegraphError):
    """An engine that takes no requests: it is starting, stopping, or has failed."""

    code = "OG-ENGINE"


class ServeError(OnegraphError):
    """A server that can't start: its packages are missing, or its address can't be had."""

    code = "OG-SERVE"


class TraceError(OnegraphError):
    """A trace that can't be made or read: the command can't be started, or wrote none, or a report isn't one."""

    code = "OG-TRACE"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the known word most like this one, or else all known words."""
    names = sorted(set(known))
    matches = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if matches:
        return f"did you mean {matches[0]!r}?"
    return f"known: {', '.join(names)}" if len(names) <= 40 else f"{len(names)} names are known"
