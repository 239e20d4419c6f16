"""The store of artifacts: content-addressed blobs, one manifest for each key, and a lock for each key.

    ROOT/entries/ab/abcd…/manifest.json   the entry of the key abcd…
    ROOT/blobs/12/1234…                   a file's contents, named by its sha256
    ROOT/locks/abcd….lock                 held by the process that compiles the key
    ROOT/autotuned/…                      autotuned choices, see `choices`
    ROOT/quarantine/…                     entries that failed their checks, kept for a look

A blob or manifest appears whole, by a rename, or not at all. An entry that fails its checks is moved aside and
counts as a miss. Removing the root by hand, at any time, costs a recompile.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from onegraph.counters import counters
from onegraph.errors import ArtifactError, CompileError
from onegraph.ir.artifact import Artifact
from onegraph.log import get_logger
from onegraph.store.files import put
from onegraph.store.manifest import FileRecord, Manifest, ManifestError

log = get_logger(__name__)


@dataclass(frozen=True)
class StoredArtifact:
    """An entry whose files were verified: `files` maps their names to where they lie."""

    manifest: Manifest
    files: Mapping[str, Path]


class Store:
    """A store under one root folder. Raises ArtifactError where the root can't be used at all; see `open_root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open_root(self) -> None:
        """Makes the root, for its owner alone. Raises ArtifactError if it can't be written, or others can write it.

        Loading an artifact runs code, so a folder that another user can write is refused.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            facts = self.root.stat()
        except OSError as error:
            raise ArtifactError(
                f"the cache root {self.root} can't be made: {error.strerror}",
                where=str(self.root),
                hint="set ONEGRAPH_CACHE_ROOT to a folder of yours, or ONEGRAPH_DISABLE_COMPILE_CACHE=1",
            ) from error
        if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ArtifactError(
                f"the cache root {self.root} can be written by other users, and artifacts are code",
                where=f"owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):04o}",
                hint=f"chown {os.geteuid()} {self.root} && chmod 700 {self.root}",
            )
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise ArtifactError(
                f"the cache root {self.root} is not writable",
                where=f"mode {stat.S_IMODE(facts.st_mode):04o}",
                hint=f"chmod 700 {self.root}, or set ONEGRAPH_CACHE_ROOT or ONEGRAPH_DISABLE_COMPILE_CACHE=1",
            )

    def read(self, digest: str) -> StoredArtifact | None:
        """The entry of a key with all of its files verified, or None. A bad entry is moved to quarantine."""
        folder = self._entry(digest)
        try:
            manifest = Manifest.from_json((folder / "manifest.json").read_text())
            if manifest.key != digest:
                raise ManifestError(f"it is the manifest of {manifest.key}")
            return StoredArtifact(manifest, {name: self._verified(name, r) for name, r in manifest.files.items()})
        except (FileNotFoundError, NotADirectoryError) as error:
            if not folder.exists():
                return None
            self.quarantine(digest, f"{error.filename} is missing")
        except (ManifestError, OSError, UnicodeDecodeError, RecursionError) as error:
            self.quarantine(digest, str(error))
        return None

    def write(self, artifact: Artifact) -> StoredArtifact:
        """Writes blobs first and the manifest last. Raises OSError where the disk doesn't take it."""
        records = {}
        for name, contents in artifact.files.items():
            record = FileRecord(hashlib.sha256(contents).hexdigest(), len(contents))
            put(self._blob(record.sha256), contents)
            records[name] = record
        manifest = Manifest.of(artifact, records)
        put(self._entry(manifest.key) / "manifest.json", manifest.to_json().encode())
        counters.add("store_writes")
        return StoredArtifact(manifest, {name: self._blob(record.sha256) for name, record in records.items()})

    @contextlib.contextmanager
    def lock(self, digest: str, before_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Held while a key is compiled, so that of several processes one compiles and the others read.

        `before_waiting()` is called when another holds it, to give back other locks: two processes that hold one each
        and wait for the other's would wait for ever. Where the file system has no locks, everybody compiles: the
        result is the same.
        """
        path = self.root / "locks" / f"{digest}.lock"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = FileLock(path, thread_local=False)  # another thread may give it back
            try:
                held.acquire(blocking=False)
            except Timeout:
                before_waiting()
                held.acquire()
        except (OSError, NotImplementedError) as error:
            log.warning("no lock for %s (%s): compiling without one", digest[:12], error)
            yield
            return
        try:
            yield
        finally:
            held.release()

    def size_bytes(self) -> int:
        """The bytes that all blobs and manifests take."""
        total = 0
        for folder in ("blobs", "entries", "autotuned"):
            for path in (self.root / folder).rglob("*"):
                with contextlib.suppress(OSError):
                    total += path.stat().st_size if path.is_file() else 0
        return total

    def _entry(self, digest: str) -> Path:
        return self.root / "entries" / digest[:2] / digest

    def _blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256[:2] / sha256

    def _verified(self, name: str, record: FileRecord) -> Path:
        path = self._blob(record.sha256)
        if hashlib.sha256(path.read_bytes()).hexdigest() != record.sha256:
            path.unlink()
            raise ManifestError(f"{name} doesn't have the checksum that it was written with")
        return path

    def quarantine(self, digest: str, reason: str) -> None:
        """Moves an entry aside, with one line that says why. Its key then counts as a miss."""
        folder = self._entry(digest)
        counters.add("store_quarantined")
        log.warning("the artifact %s is bad (%s): moved to quarantine and compiled again", folder.name[:12], reason)
        target = self.root / "quarantine"
        try:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.replace(folder, Path(tempfile.mkdtemp(dir=target, prefix=f"{folder.name[:12]}-")) / folder.name)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def outside_the_store(files: Mapping[str, bytes]) -> Iterator[dict[str, Path]]:
    """An artifact's files, where no store keeps them, while it is loaded. Raises CompileError where no disk does."""
    with tempfile.TemporaryDirectory(prefix="onegraph-artifact-") as folder:
        paths = {name: Path(folder) / name for name in files}
        try:
            for name, contents in files.items():
                paths[name].write_bytes(contents)
        except OSError as error:
            raise CompileError(
                f"what was built can't be written: {error}", where=folder, hint=f"make room in {tempfile.gettempdir()}"
            ) from error
        yield paths
