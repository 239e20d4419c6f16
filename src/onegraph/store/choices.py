"""The record of autotuned choices: a readable JSON file for each question, which may be edited.

ROOT/autotuned/choices/ab/abcd….json   the choice, and what was measured
ROOT/autotuned/pieces/12/1234….json    the questions that a piece asks, by the digest of its key without choices
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from onegraph.ir.autotune import TunedChoice
from onegraph.log import get_logger
from onegraph.store.files import put
from onegraph.store.store import Store

log = get_logger(__name__)


class Choices:
    """Implements `ir.autotune.ChoiceRecords` in a store. A file that can't be read or written counts as none."""

    def __init__(self, store: Store) -> None:
        self._store, self._root = store, store.root / "autotuned"

    def read(self, digest: str) -> TunedChoice | None:
        data = _read(self._path("choices", digest))
        try:
            return None if data is None else TunedChoice.from_dict(data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            log.warning("the recorded choice %s is unreadable: %r", digest[:12], error)
            return None

    def keep(self, digest: str, choice: TunedChoice, machine: Mapping[str, Any]) -> None:
        _write(self._path("choices", digest), {**choice.to_dict(), "machine": dict(machine)})

    def measuring(self) -> AbstractContextManager[None]:
        return self._store.lock("autotuning")

    def asked_by(self, piece: str) -> tuple[str, ...] | None:
        data = _read(self._path("pieces", piece))
        return tuple(map(str, data)) if isinstance(data, list) else None

    def keep_asked(self, piece: str, digests: tuple[str, ...]) -> None:
        _write(self._path("pieces", piece), list(digests))

    def _path(self, kind: str, digest: str) -> Path:
        return self._root / kind / digest[:2] / f"{digest}.json"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s can't be read: %s", path, error)
        return None


def _write(path: Path, data: Any) -> None:
    try:
        put(path, (json.dumps(data, indent=1) + "\n").encode())
    except OSError as error:
        log.warning("%s couldn't be kept: %s", path, error)
