"""The record of which kernel runs each linear layer: a readable JSON file for each shape, which may be edited.

ROOT/autotuned/linear/ab/abcd….json   the kernel for each number of tokens, and what was measured
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from onegraph.ir.linear import LinearChoice
from onegraph.log import get_logger
from onegraph.store.store import Store

log = get_logger(__name__)


class LinearChoices:
    """By the digest of shape and machine. A file that can't be read or written counts as none.

    Records aren't signed: one that names a kernel that the target doesn't have is measured anew.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, digest: str) -> LinearChoice | None:
        data = self._store.read_record(*_path(digest))
        try:
            return None if data is None else LinearChoice.from_dict(data)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            log.warning("the recorded choice %s is unreadable: %r", digest[:12], error)
            return None

    def keep(self, digest: str, choice: LinearChoice, machine: Mapping[str, Any]) -> None:
        """Records a choice, with the facts under which it holds."""
        self._store.write_record({**choice.to_dict(), "machine": dict(machine)}, *_path(digest))

    def measuring(self) -> AbstractContextManager[None]:
        """Held while measuring, as for autotuned choices: one process measures at a time, the others read."""
        return self._store.lock("autotuning")


def _path(digest: str) -> tuple[str, ...]:
    return "autotuned", "linear", digest[:2], f"{digest}.json"
