"""Artifacts from the store, as callables: loaded by their keys, without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from onegraph.errors import ArtifactError, CompileError
from onegraph.store.layer import StoredArtifact
from onegraph.store.manifest import Manifest
from onegraph.store.store import Store

Loaded = TypeVar("Loaded")


def load_kept(
    store: Store,
    digest: str,
    load: Callable[[StoredArtifact], Loaded],
    holds: Callable[[Manifest], bool] = lambda manifest: True,
) -> tuple[Loaded, StoredArtifact] | None:
    """The artifact of a key, loaded; None where there is none, or it doesn't hold. A bad one is quarantined.

    Raises what `load` says of what somebody has edited: ArtifactError, CompileError.
    """
    stored = store.read(digest)
    if stored is None or not holds(stored.manifest):
        return None
    try:
        return load(stored), stored
    except (ArtifactError, CompileError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever is wrong with stored code, compiling anew mends it
        store.quarantine(digest, f"it can't be loaded: {type(error).__name__}: {error}")
        return None
