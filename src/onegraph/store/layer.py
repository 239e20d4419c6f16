"""One folder of the store: its entries, blobs and records, read and verified. Writes nothing.

    FOLDER/entries/ab/abcd…/manifest.json   the entry of the key abcd…
    FOLDER/blobs/12/1234…                   a file's contents, named by its sha256

What is read raises an error with the reason; the store decides what becomes of a bad entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from onegraph.store.manifest import SHA256, FileRecord, Manifest, ManifestError
from onegraph.store.signing import Signer

MANIFEST = "manifest.json"
GRAPH = "graph.txt.gz"
"""The file of an entry with the canonical text of its graph: for people, and to tell why another graph missed."""


INDEXED = "index"
"""Among the factors of a trace's key: the digest under which the index has it."""


class BadBlobError(ManifestError):
    """A file isn't what it was written as; `path` is where it lies."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class StoredArtifact:
    """An entry whose files were verified: `files` maps their names to where they lie."""

    manifest: Manifest
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Layer:
    """A folder laid out as above; `name` is `root` or `base`."""

    folder: Path
    name: str = "root"

    def entry(self, digest: str) -> Path:
        return self.folder / "entries" / digest[:2] / digest

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256[:2] / sha256

    def indexed(self, digest: str) -> Path:
        """The folder with the keys of traces, as names of empty files."""
        return self.folder / "index" / digest[:2] / digest

    def digests(self) -> list[str]:
        """The keys that have an entry, good or bad: a folder with a manifest, or what stands in the place of one."""
        found = (path for path in self._children("entries") if SHA256.fullmatch(path.name))
        return sorted(path.name for path in found if not os.path.isdir(path) or os.path.lexists(path / MANIFEST))

    def blobs(self) -> dict[str, Path]:
        """All blobs by their name, whether or not an entry has them."""
        return {path.name: path for path in self._children("blobs") if SHA256.fullmatch(path.name)}

    def manifest(self, digest: str, signer: Signer | None = None) -> Manifest:
        """The manifest of a key, with its signature checked. Raises ManifestError, UnsignedError, OSError."""
        try:
            manifest = Manifest.from_json(read_regular(self.entry(digest) / MANIFEST).decode())
        except (UnicodeDecodeError, RecursionError) as error:
            raise ManifestError(f"unreadable: {error}") from error
        if manifest.key != digest:
            raise ManifestError(f"it is the manifest of {manifest.key}")
        if signer is not None:
            signer.check(manifest)
        return manifest

    def read(self, digest: str, signer: Signer | None = None) -> StoredArtifact:
        """An entry with all of its files verified. Raises ManifestError, UnsignedError, OSError."""
        manifest = self.manifest(digest, signer)
        return StoredArtifact(manifest, {name: self.verified(name, one) for name, one in manifest.files.items()})

    def verified(self, name: str, record: FileRecord) -> Path:
        """Where a file lies, after its contents were compared. Raises BadBlobError, OSError."""
        path = self.blob(record.sha256)
        try:
            contents = read_regular(path, record.size_bytes)
        except FileNotFoundError:
            raise BadBlobError(f"{name} is missing", path) from None
        except NotRegularError as error:
            raise BadBlobError(f"{name} is {error}", path) from error
        if hashlib.sha256(contents).hexdigest() != record.sha256:
            raise BadBlobError(f"{name} doesn't have the checksum that it was written with", path)
        return path

    def last_used(self, digest: str) -> float:
        """Seconds since the epoch: a hit sets the manifest's time. 0 where nobody knows."""
        try:
            return (self.entry(digest) / MANIFEST).stat().st_mtime
        except OSError:
            return 0.0

    def _children(self, name: str) -> Iterator[Path]:
        """What lies in `name/ab/`; nothing where a folder can't be read."""
        with contextlib.suppress(OSError):
            for inner in sorted((self.folder / name).iterdir()):
                with contextlib.suppress(OSError):
                    yield from sorted(inner.iterdir())


class NotRegularError(OSError):
    """What is read is no file of that size."""


def read_regular(path: Path, size_bytes: int | None = None) -> bytes:
    """The contents of a regular file; of that size, if one is given. Never waits, as for a pipe. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise NotRegularError("no regular file")
        if size_bytes is not None and facts.st_size != size_bytes:
            raise NotRegularError(f"of {facts.st_size} bytes, and was of {size_bytes}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)
