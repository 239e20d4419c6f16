"""Whether all that the store holds is as it was written, and nobody else can change it: `onegraph cache verify`.

Looks only: what is bad stays where it is, and is moved aside when a process meets it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onegraph.ir.key import Key
from onegraph.store.folders import LAYOUT, MARKER
from onegraph.store.layer import Layer
from onegraph.store.manifest import SHA256, Manifest, ManifestError
from onegraph.store.signing import UnsignedError
from onegraph.store.store import Store

_READ = (*(name for name in LAYOUT if name != "quarantine"), MARKER)
Progress = Callable[[Iterable[str], str], Iterable[str]]
"""Hands the items on, and shows how many are done."""


@dataclass
class Verification:
    """`problems` are pairs of a key or path and what is wrong. Orphans are blobs that no entry has: only lost room."""

    num_entries: int = 0
    num_files: int = 0
    size_bytes: int = 0
    signatures: str = "not checked: ONEGRAPH_CACHE_KEY_FILE isn't set"
    problems: list[tuple[str, str]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    orphan_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "entries": self.num_entries,
            "files": self.num_files,
            "size_bytes": self.size_bytes,
            "signatures": self.signatures,
            "problems": [{"where": where, "problem": problem} for where, problem in self.problems],
            "orphans": self.orphans,
            "orphan_bytes": self.orphan_bytes,
        }


def verify(store: Store, progress: Progress = lambda items, what: items) -> Verification:
    """Checks owners, modes, manifests, signatures and checksums of all layers."""
    found = Verification()
    if store.signer is not None:
        found.signatures = "checked"
    for layer in store.layers:
        if not layer.folder.exists():
            continue
        found.problems += writable_by_others(
            layer.folder, {0, os.geteuid()} if layer.name == "base" else {os.geteuid()}
        )
        _verify_entries(layer, store, found, progress)
    return found


def _verify_entries(layer: Layer, store: Store, found: Verification, progress: Progress) -> None:
    blobs, used, good = layer.blobs(), set[str](), set[str]()
    for digest in progress(layer.digests(), f"entries of the {layer.name}"):
        found.num_entries += 1
        try:
            manifest = layer.manifest(digest)
            used |= {record.sha256 for record in manifest.files.values()}
            _verify_manifest(manifest, store)
            for name, record in manifest.files.items():
                if record.sha256 not in good:
                    layer.verified(name, record)
                    good.add(record.sha256)
                    found.num_files += 1
                    found.size_bytes += record.size_bytes
        except UnsignedError:
            found.problems.append((digest, "it has no signature, and ONEGRAPH_CACHE_KEY_FILE asks for one"))
        except (ManifestError, OSError) as error:
            found.problems.append((digest, str(error)))
    for name in sorted(set(blobs) - used):
        found.orphans.append(str(blobs[name]))
        found.orphan_bytes += blobs[name].lstat().st_size
    for path in unknown(layer):
        found.problems.append((str(path), "nothing of onegraph's has such a name"))


def _verify_manifest(manifest: Manifest, store: Store) -> None:
    if store.signer is not None:
        store.signer.check(manifest)
    if Key.of(manifest.factors).digest != manifest.key:
        raise ManifestError("its key isn't the digest of its factors")


def unknown(layer: Layer) -> Iterator[Path]:
    """What lies among entries and blobs and is neither, nor a file that a dead writer left."""
    for name in ("entries", "blobs"):
        with contextlib.suppress(OSError):
            for inner in (layer.folder / name).iterdir():
                if not inner.is_dir():
                    yield inner
                    continue
                for path in inner.iterdir():
                    if not SHA256.fullmatch(path.name) and not path.name.startswith(".writing-"):
                        yield path


def writable_by_others(folder: Path, owners: set[int]) -> list[tuple[str, str]]:
    """What below a root another user can write, or might have written."""
    found = []
    for path in (folder, *(path for name in _READ for path in _all(folder / name))):
        try:
            facts = path.lstat()
        except OSError:
            continue
        mode = f"owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):04o}"
        if stat.S_ISLNK(facts.st_mode):
            found.append((str(path), "a link, which may lead outside"))
        elif facts.st_uid not in owners or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            found.append((str(path), f"other users can write it ({mode})"))
    return found


def _all(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        yield from path.rglob("*")
