"""The index: which traces were made of a module's code under a configuration, so that a warm start traces nothing.

ROOT/index/ab/abcd…/KEY      an empty file for each trace; KEY is its entry in the store

The digest abcd… is that of what is known without tracing; whether a trace is right for a module and a call, only its
own checks tell. The traces are entries like others: verified when they are read, quarantined when they fail.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from onegraph.errors import OnegraphError
from onegraph.ir.artifact import Artifact
from onegraph.ir.key import Key
from onegraph.ir.ledger import LedgerCheck
from onegraph.log import get_logger
from onegraph.store.layer import INDEXED
from onegraph.store.manifest import SHA256
from onegraph.store.store import Store

log = get_logger(__name__)

CONTENTS = "trace.pickle"
MAX_TRACES = 16
"""So many traces are kept for one digest: those for other states of the same code. The oldest go."""

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Miss:
    """Why no trace was taken: for each that there is, in words, that which was nearest first.

    `checks` are those of the nearest one's facts, as far as they were made.
    """

    reasons: tuple[str, ...]
    checks: tuple[LedgerCheck, ...] = ()

    def __str__(self) -> str:
        return self.reasons[0] if self.reasons else "no trace of this code under this configuration is kept"


class TraceRefusedError(Exception):
    """Raised by `load`: the trace isn't for this module or call, or what it needs is gone; the message says why.

    `num_held` is how many of its facts were found to hold before, `checks` are those of its values.
    """

    def __init__(self, message: str, num_held: int = 0, checks: tuple[LedgerCheck, ...] = ()) -> None:
        super().__init__(message)
        self.num_held = num_held
        self.checks = checks


class Index:
    """The traces of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def lookup(self, digest: str, load: Callable[[bytes, str], Loaded]) -> Loaded | Miss:
        """What `load` makes of the newest trace that it doesn't refuse.

        `load(contents, key)` raises TraceRefusedError. What else it raises quarantines the trace.
        """
        refusals: list[TraceRefusedError] = []
        for key in self._newest_first(digest):
            stored = self._store.read(key)
            if stored is None:  # gone, quarantined, or without the signature that is asked for
                if not any(layer.entry(key).exists() for layer in self._store.layers):
                    self._forget(digest, key)
                continue
            if stored.manifest.factors.get(INDEXED) != digest or CONTENTS not in stored.files:
                self._forget(digest, key)
                continue
            try:
                return load(stored.files[CONTENTS].read_bytes(), key)
            except TraceRefusedError as refused:
                refusals.append(refused)
            except (OnegraphError, FileNotFoundError) as error:
                refusals.append(TraceRefusedError(str(error).splitlines()[0]))
            except Exception as error:  # noqa: BLE001 - whatever is wrong with a stored trace, tracing anew mends it
                self._store.quarantine(key, f"it can't be loaded: {type(error).__name__}: {error}")
                self._forget(digest, key)
        refusals.sort(key=lambda one: -one.num_held)
        return Miss(tuple(map(str, refusals)), refusals[0].checks if refusals else ())

    def keep(self, digest: str, contents: bytes, what: str, seconds: float) -> str | None:
        """Keeps a trace, if the store keeps anything and the disk takes it; gives its key then.

        `seconds` is what making it took.
        """
        if not self._store.keeps:
            return None
        key = Key.of({INDEXED: digest, "trace": what, "contents": hashlib.sha256(contents).hexdigest()})
        try:
            self._store.write(Artifact(key, {CONTENTS: contents}, seconds=seconds))
        except OSError as error:
            log.warning("the trace couldn't be kept in %s: %s", self._store.root, error)
            return None
        for old in self._newest_first(digest)[MAX_TRACES:]:
            self._forget(digest, old)
        return key.digest

    def _newest_first(self, digest: str) -> list[str]:
        found: dict[str, float] = {}
        for layer in self._store.layers:
            with contextlib.suppress(OSError):
                for path in layer.indexed(digest).iterdir():
                    if SHA256.fullmatch(path.name):
                        found.setdefault(path.name, path.stat().st_mtime)
        return sorted(found, key=lambda name: -found[name])

    def _forget(self, digest: str, key: str) -> None:
        if self._store.keeps:
            with contextlib.suppress(OSError):
                (self._store.layers[0].indexed(digest) / key).unlink()
