"""The store of artifacts: content-addressed blobs, one manifest for each key, and a lock for each key.

    ROOT/entries/ab/abcd…/manifest.json   the entry of the key abcd…
    ROOT/blobs/12/1234…                   a file's contents, named by its sha256
    ROOT/locks/abcd….lock                 held by the process that compiles the key
    ROOT/index/ab/abcd…/…                 the traces of some code, see `index`
    ROOT/autotuned/…                      choices of kernels, see `choices` and `linear_choices`
    ROOT/quarantine/…                     entries that failed their checks, kept for a look

Below the root there may be a base: a folder laid out in the same way, which is only read. A blob or manifest appears
whole, by a rename, or not at all. An entry that fails its checks is moved aside and counts as a miss; one of the base
is left where it is, and what is compiled anew lies over it. Removing the root by hand, at any time, costs a recompile.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from onegraph.counters import counters
from onegraph.env import Environment
from onegraph.errors import CompileError
from onegraph.ir.artifact import Artifact
from onegraph.ir.key import Key
from onegraph.log import get_logger
from onegraph.store.files import make_folder, put, read_json, remove, write_json
from onegraph.store.folders import check_base, check_root, mark_root
from onegraph.store.layer import GRAPH, INDEXED, MANIFEST, BadBlobError, Layer, StoredArtifact
from onegraph.store.manifest import SHA256, FileRecord, Manifest, ManifestError
from onegraph.store.nearest import Nearest, nearest, packed_graph
from onegraph.store.signing import Signer, UnsignedError

log = get_logger(__name__)

_COMPARED = 1000
"""So many entries, those used last, are looked at to tell why a key missed."""


class Store:
    """A store under one root folder, over a base if there is one.

    With a `signer`, entries without its signature aren't used. `keeps` False means that nothing is written.
    """

    def __init__(self, root: Path, base: Path | None = None, signer: Signer | None = None) -> None:
        self.root, self.base, self.signer = root, base, signer
        self.keeps = True
        self.layers = (Layer(root), *(() if base is None else (Layer(base, "base"),)))
        self._refused: dict[str, str] = {}
        self._left_out: set[str] = set()

    @classmethod
    def configured(cls, current: Environment) -> Store:
        """As the environment has it. Raises ArtifactError for a key file that can't be used."""
        signer = None if current.cache_key_file is None else Signer.of_file(current.cache_key_file)
        return cls(current.cache_root, current.cache_base, signer)

    def open_root(self) -> None:
        """Makes the root, for its owner alone. Raises ArtifactError if it can't be written, or others can write it."""
        check_root(self.root, make=True)
        mark_root(self.root)

    def open_base(self) -> None:
        """Raises ArtifactError for a base that isn't there, or that others can write."""
        if self.base is not None:
            check_base(self.base, self.root)

    def read(self, digest: str) -> StoredArtifact | None:
        """The entry of a key with all of its files verified, or None. A bad entry is moved to quarantine."""
        stored: StoredArtifact
        for layer in self.layers:
            try:
                if layer.name == "base" and digest in self._left_out:
                    continue
                stored = layer.read(digest, self.signer)
            except UnsignedError:
                self._refuse(digest, "it has no signature, and ONEGRAPH_CACHE_KEY_FILE asks for one", layer)
            except FileNotFoundError:
                continue  # a folder without a manifest is what a writer has begun
            except (ManifestError, OSError) as error:
                if isinstance(error, BadBlobError) and layer.name == "root" and self.keeps:
                    remove(error.path)
                self.quarantine(digest, str(error), layer)
            else:
                if layer.name == "root" and self.keeps:
                    with contextlib.suppress(OSError):
                        os.utime(layer.entry(digest) / MANIFEST)  # when it was used last
                return stored
        return None

    def write(self, artifact: Artifact) -> StoredArtifact:
        """Writes blobs first and the manifest last. Raises OSError where the disk doesn't take it."""
        if not self.keeps:
            raise OSError(errno.EROFS, "the cache root is only read", str(self.root))
        layer, records = self.layers[0], {}
        files = dict(artifact.files)
        if artifact.key.graph:
            files[GRAPH] = packed_graph(artifact.key.graph)
        for name, contents in files.items():
            record = FileRecord(hashlib.sha256(contents).hexdigest(), len(contents))
            put(layer.blob(record.sha256), contents)
            records[name] = record
        manifest = Manifest.of(artifact, records)
        if self.signer is not None:
            manifest = self.signer.signed(manifest)
        self.keep_manifest(manifest)
        counters.add("store_writes")
        return StoredArtifact(manifest, {name: layer.blob(record.sha256) for name, record in records.items()})

    def keep_manifest(self, manifest: Manifest) -> None:
        """Makes an entry seen whose blobs are in place; that of a trace also in the index. Raises OSError."""
        put(self.layers[0].entry(manifest.key) / MANIFEST, manifest.to_json().encode())
        digest = manifest.factors.get(INDEXED)
        if isinstance(digest, str) and SHA256.fullmatch(digest):
            put(self.layers[0].indexed(digest) / manifest.key, b"")

    @contextlib.contextmanager
    def lock(self, digest: str, before_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Held while a key is compiled, so that of several processes one compiles and the others read.

        `before_waiting()` is called when another holds it, to give back other locks: two processes that hold one each
        and wait for the other's would wait for ever. Where the file system has no locks, everybody compiles: the
        result is the same.
        """
        if not self.keeps:
            yield
            return
        path = self.root / "locks" / f"{digest}.lock"
        try:
            make_folder(path.parent)
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

    def quarantine(self, digest: str, reason: str, layer: Layer | None = None) -> None:
        """Moves an entry aside, with one line that says why. Its key then counts as a miss.

        Nothing of the base is moved: it is left out, until what is compiled anew lies over it.
        """
        if layer is None:
            layer = next((one for one in self.layers if os.path.exists(one.entry(digest))), self.layers[0])
        folder = layer.entry(digest)
        if not os.path.exists(folder):
            self._refuse(digest, f"it was removed while it was read: {reason}", layer)
            return
        counters.add("store_quarantined")
        if layer.name == "base" or not self.keeps:
            self._left_out.add(digest)
            self._refuse(digest, f"it is bad: {reason}", layer)
            return
        self._refused[digest] = reason
        log.warning("the artifact %s is bad (%s): moved to quarantine and compiled again", folder.name[:12], reason)
        target = self.root / "quarantine"
        try:
            make_folder(target)
            os.replace(folder, Path(tempfile.mkdtemp(dir=target, prefix=f"{folder.name[:12]}-")) / folder.name)
        except OSError:
            remove(folder)

    def _refuse(self, digest: str, reason: str, layer: Layer) -> None:
        counters.add("store_refused")
        log.warning("the artifact %s of %s isn't used (%s): compiled again", digest[:12], layer.folder, reason)
        self._refused[digest] = reason

    def why_missed(self, key: Key) -> str:
        """Why `read` gave nothing, in words: the entry was refused, or which other one is nearest."""
        if key.digest in self._refused:
            return f"the stored artifact couldn't be used: {self._refused[key.digest]}"
        found = self.nearest(key)
        return "no artifact has this key" + (f"; {found}" if found is not None else "")

    def nearest(self, key: Key) -> Nearest | None:
        """The entry that is most like a key, of those that were there when this was first asked."""
        return nearest(key, self._known, self._graph_of)

    def nearest_to(self, digest: str) -> Nearest | None:
        """As `nearest`, of a key that has an entry by now; None where it can't be read."""
        for layer in self.layers:
            with contextlib.suppress(ManifestError, UnsignedError, OSError):
                manifest = layer.manifest(digest)
                return self.nearest(Key(digest, manifest.factors, self._graph_of(manifest)))
        return None

    def path_of(self, digest: str, name: str) -> Path | None:
        """Where a file of a key's entry lies, unread; None where there is none."""
        for layer in self.layers:
            with contextlib.suppress(ManifestError, UnsignedError, OSError, KeyError):
                path: Path = layer.blob(layer.manifest(digest).files[name].sha256)
                return path
        return None

    @cached_property
    def _known(self) -> list[Manifest]:
        used = {digest: layer.last_used(digest) for layer in reversed(self.layers) for digest in layer.digests()}
        found = []
        for digest in sorted(used, key=lambda one: -used[one])[:_COMPARED]:
            for layer in self.layers:
                with contextlib.suppress(ManifestError, UnsignedError, OSError):
                    found.append(layer.manifest(digest))
                    break
        return found

    def _graph_of(self, manifest: Manifest) -> str:
        for layer in self.layers if GRAPH in manifest.files else ():
            with contextlib.suppress(ManifestError, OSError, ValueError, EOFError, zlib.error):
                return gzip.decompress(layer.verified(GRAPH, manifest.files[GRAPH]).read_bytes()).decode()
        return ""

    def read_record(self, *path: str) -> Any:
        """A small JSON file below the root, or below the base; None where there is none that can be read."""
        found = (read_json(layer.folder.joinpath(*path)) for layer in self.layers)
        return next((data for data in found if data is not None), None)

    def write_record(self, data: Any, *path: str) -> None:
        """Keeps it below the root, if the disk takes it."""
        if self.keeps:
            write_json(self.root.joinpath(*path), data)

    def size_bytes(self) -> int:
        """The bytes that all blobs, manifests and records under the root take."""
        total = 0
        for folder in ("blobs", "entries", "autotuned"):
            for path in (self.root / folder).rglob("*"):
                with contextlib.suppress(OSError):
                    total += path.stat().st_size if path.is_file() else 0
        return total


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
