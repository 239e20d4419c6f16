"""Making room: entries that were used longest ago, or all that is under the root. Never touches a base.

A manifest goes before its blobs, and a blob only when no other manifest names it. Who reads meanwhile and finds one
gone compiles again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onegraph.errors import ArtifactError
from onegraph.store.files import remove
from onegraph.store.folders import LAYOUT, MARKER, check_root, foreign, is_ours
from onegraph.store.layer import Layer
from onegraph.store.manifest import ManifestError

_WRITTEN_S = 600
"""A blob without a manifest that is younger may be of an artifact that is being written."""


@dataclass(frozen=True)
class Freed:
    """What was removed, and what is left."""

    entries: int
    size_bytes: int
    left_entries: int
    left_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def prune(root: Path, *, max_bytes: int | None = None, max_age_s: float | None = None) -> Freed:
    """Removes entries until the rest is no older and no larger; those used longest ago go first.

    With them goes what nobody needs: entries in quarantine that are older than that, blobs that no entry has, and what
    dead writers left. Edited artifacts and records of choices stay. Raises ArtifactError for a root that isn't ours.
    """
    _check_ours(root)
    layer, now = Layer(root), time.time()
    before = _size(root)
    _remove_left_overs(root, now, max_age_s, max_bytes)
    used = {digest: layer.last_used(digest) for digest in layer.digests()}
    sizes: dict[str, int] = {}
    owners: Counter[str] = Counter()
    files: dict[str, set[str]] = {}
    for digest in used:
        with contextlib.suppress(ManifestError, OSError):
            records = layer.manifest(digest).files.values()
            files[digest] = {record.sha256 for record in records}
            owners.update(files[digest])
            sizes.update({record.sha256: record.size_bytes for record in records})
    blobs = layer.blobs()
    for name in set(blobs) - set(owners):
        with contextlib.suppress(OSError):
            if now - blobs[name].lstat().st_mtime > _WRITTEN_S:
                remove(blobs[name])
    total = _size(root)
    removed = 0
    for digest in sorted(used, key=lambda one: used[one]):
        too_old = max_age_s is not None and now - used[digest] > max_age_s
        if not too_old and (max_bytes is None or total <= max_bytes):
            continue
        total -= _size(layer.entry(digest))
        _remove_whole(layer.entry(digest), root)
        remove(root / "locks" / f"{digest}.lock")
        removed += 1
        for sha256 in files.get(digest, ()):
            owners[sha256] -= 1
            if not owners[sha256]:
                remove(layer.blob(sha256))
                total -= sizes[sha256]
    left = _size(root)
    return Freed(removed, before - left, len(used) - removed, left)


def clear(root: Path, *, edits_only: bool = False) -> Freed:
    """Removes all that lies under a root, or only edited artifacts; the empty root stays.

    Raises ArtifactError for a folder that isn't a root of ours.
    """
    _check_ours(root)
    layer, before = Layer(root), _size(root)
    entries = len(layer.digests())
    for name in ("unpacked",) if edits_only else LAYOUT:
        remove(root / name)
    for path in () if edits_only else root.glob(".writing-*"):
        remove(path)
    left = len(layer.digests())
    return Freed(entries - left, before - _size(root), left, _size(root))


def _check_ours(root: Path) -> None:
    check_root(root, make=False)
    if not is_ours(root):
        names = foreign(root)
        raise ArtifactError(
            f"{root} isn't a compile cache alone: it holds {', '.join(names[:3])}" + (" …" if len(names) > 3 else ""),
            where=f"{root} has no {MARKER} of onegraph",
            hint=f"set ONEGRAPH_CACHE_ROOT, or remove {', '.join(LAYOUT)} there by hand",
        )


def _remove_left_overs(root: Path, now: float, max_age_s: float | None, max_bytes: int | None) -> None:
    for path in root.rglob(".writing-*"):
        with contextlib.suppress(OSError):
            if now - path.lstat().st_mtime > _WRITTEN_S:
                remove(path)
    quarantine = root / "quarantine"
    for path in quarantine.iterdir() if quarantine.is_dir() else ():
        with contextlib.suppress(OSError):
            age = now - path.lstat().st_mtime
            if (max_age_s is not None and age > max_age_s) or (max_bytes is not None and _size(root) > max_bytes):
                shutil.rmtree(path)


def _remove_whole(folder: Path, root: Path) -> None:
    """Nobody sees half of it."""
    aside = root / f".writing-{folder.name}"
    with contextlib.suppress(OSError):
        os.replace(folder, aside)
    remove(aside)


def _size(folder: Path) -> int:
    """The bytes of all files under a folder; links count as themselves."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total
