"""The record of autotuned choices: a readable JSON file for each question, which may be edited.

ROOT/autotuned/choices/ab/abcd….json   the choice, and what was measured
ROOT/autotuned/pieces/12/1234….json    the questions that a piece asks, by the digest of its key without choices
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from onegraph.ir.autotune import TunedChoice
from onegraph.log import get_logger
from onegraph.store.store import Store

log = get_logger(__name__)


class Choices:
    """Implements `ir.autotune.ChoiceRecords` in a store. A file that can't be read or written counts as none.

    Records aren't signed: a choice is one of the kernels that torch names, and names no code of its own.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, digest: str) -> TunedChoice | None:
        data = self._store.read_record(*_path("choices", digest))
        try:
            return None if data is None else TunedChoice.from_dict(data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            log.warning("the recorded choice %s is unreadable: %r", digest[:12], error)
            return None

    def keep(self, digest: str, choice: TunedChoice, machine: Mapping[str, Any]) -> None:
        self._store.write_record({**choice.to_dict(), "machine": dict(machine)}, *_path("choices", digest))

    def measuring(self) -> AbstractContextManager[None]:
        return self._store.lock("autotuning")

    def asked_by(self, piece: str) -> tuple[str, ...] | None:
        data = self._store.read_record(*_path("pieces", piece))
        return tuple(map(str, data)) if isinstance(data, list) else None

    def keep_asked(self, piece: str, digests: tuple[str, ...]) -> None:
        self._store.write_record(list(digests), *_path("pieces", piece))


def _path(kind: str, digest: str) -> tuple[str, ...]:
    return "autotuned", kind, digest[:2], f"{digest}.json"
