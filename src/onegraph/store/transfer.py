"""Artifacts in one file, to take to another machine: `onegraph cache export` and `import`.

A zip archive: `contents.json` tells what is in it, then come `entries/KEY.json` (manifests), `blobs/SHA256`, and
`autotuned/…` (records of choices). An import unpacks everything beside the store, verifies it there, and only then
moves it in place, manifests last; an archive of which one part is bad changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onegraph.errors import ArtifactError, ConfigError
from onegraph.ir.key import Key
from onegraph.store.files import make_folder
from onegraph.store.layer import MANIFEST, Layer
from onegraph.store.listing import described
from onegraph.store.manifest import SHA256, Manifest, ManifestError
from onegraph.store.signing import UnsignedError
from onegraph.store.store import Store

CONTENTS, FORMAT = "contents.json", 1
_ENTRY = re.compile(r"entries/([0-9a-f]{64})\.json")
_BLOB = re.compile(r"blobs/([0-9a-f]{64})")
_RECORD = re.compile(r"autotuned/(choices|pieces|linear)/([0-9a-f]{2})/(\2[0-9a-f]{62})\.json")
_MAX_TEXT = 64 << 20
"""The most bytes of a manifest, a record or the table of contents."""


@dataclass(frozen=True)
class Contents:
    """What is in an archive, or was put in place; `had` are the entries that were there before."""

    entries: tuple[Manifest, ...]
    num_records: int
    size_bytes: int
    had: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "entries": [
                {
                    "key": one.key,
                    "kind": one.kind,
                    "created": one.created,
                    "what": described(one),
                    "size_bytes": one.size_bytes,
                    "signed": one.signature is not None,
                    "had": one.key in self.had,
                }
                for one in self.entries
            ],
            "records": self.num_records,
            "size_bytes": self.size_bytes,
        }


def export(store: Store, file: Path, keys: Sequence[str] = ()) -> Contents:
    """Writes entries of all layers, verified, and the records of choices that they need; all, if no key is given.

    A key may be given by its first digits. Raises ConfigError for one that there isn't or several have, ArtifactError
    for an entry that is bad, and for a place where no file can be.
    """
    place = archive_place(file)
    found: dict[str, Layer] = {}
    for layer in reversed(store.layers):
        found.update(dict.fromkeys(layer.digests(), layer))
    chosen = sorted({_chosen(key, found) for key in keys} if keys else found)
    if not chosen:
        raise ArtifactError(f"there is nothing to export in {store.root}", where=str(file))
    manifests, blobs = [], dict[str, Path]()
    for digest in chosen:
        try:
            stored = found[digest].read(digest, store.signer)
        except (ManifestError, UnsignedError, OSError) as error:
            reason = "it has no signature" if isinstance(error, UnsignedError) else str(error)
            hint = "`onegraph cache verify` tells all that is bad; --key chooses others"
            raise ArtifactError(f"the artifact {digest[:12]} is bad: {reason}", where=str(file), hint=hint) from error
        manifests.append(stored.manifest)
        blobs.update({stored.manifest.files[name].sha256: path for name, path in stored.files.items()})
    records = dict(_all_records(store) if not keys else _records_of(store, manifests))
    made = Contents(tuple(manifests), len(records), sum(path.stat().st_size for path in blobs.values()))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    parts: dict[str, str | Path] = {
        CONTENTS: json.dumps({"format": FORMAT, "created": created, **made.to_dict()}, indent=1),
        **{f"entries/{manifest.key}.json": manifest.to_json() for manifest in manifests},
        **{f"blobs/{sha256}": path for sha256, path in blobs.items()},
        **{name: json.dumps(data, indent=1) for name, data in records.items()},
    }
    try:
        _write(place, parts)
    except OSError as error:
        raise ArtifactError(f"the archive can't be written: {error}", where=str(file)) from error
    return made


def archive_place(file: Path) -> Path:
    """Where an archive is written: links are followed. Raises ArtifactError for a place where no file can be."""
    place = file.resolve()
    if place.exists() and not place.is_file():
        raise ArtifactError(f"{str(file)!r} is a folder or a device", where=str(file), hint="name a file")
    try:
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise ArtifactError(
            f"no file can be made in {place.parent}: {error.strerror}", where=str(file), hint="name another folder"
        ) from error
    return place


def _write(file: Path, parts: dict[str, str | Path]) -> None:
    """An archive of texts and files, which appears whole. Raises OSError."""
    with tempfile.TemporaryDirectory(dir=file.absolute().parent, prefix=".writing-") as folder:
        whole = Path(folder) / "archive"
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, part in parts.items():
                if isinstance(part, Path):
                    archive.write(part, name)
                else:
                    archive.writestr(name, part)
        os.replace(whole, file)


def import_archive(store: Store, file: Path, *, dry_run: bool = False) -> Contents:
    """Verifies all of an archive, and puts what is new in place. Raises ArtifactError for an archive that is bad."""
    try:
        with zipfile.ZipFile(file) as archive:
            return _imported(store, archive, dry_run)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ArtifactError(f"there is no such file: {error}", where=str(file), hint="name an archive") from error
    except OSError as error:
        hint = "no artifact was imported; `onegraph doctor` tells the room that is left"
        raise ArtifactError(f"the archive can't be read or unpacked: {error}", where=str(file), hint=hint) from error
    except (ManifestError, zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError) as error:
        hint = "nothing was imported; make it again, or ask where it comes from"
        raise ArtifactError(f"the archive is bad: {error}", where=str(file), hint=hint) from error
    except UnsignedError as error:
        hint = "nothing was imported; export it where ONEGRAPH_CACHE_KEY_FILE is set, or leave that out here"
        message = "an artifact of the archive has no signature, and ONEGRAPH_CACHE_KEY_FILE asks for one"
        raise ArtifactError(message, where=str(file), hint=hint) from error


def _imported(store: Store, archive: zipfile.ZipFile, dry_run: bool) -> Contents:
    manifests, blobs, records = _named(store, archive)
    wanted = {record.sha256: record.size_bytes for one in manifests for record in one.files.values()}
    if set(wanted) != blobs:
        raise ManifestError("its blobs aren't those that its manifests name")
    layer = store.layers[0]
    had = tuple(one.key for one in manifests if (layer.entry(one.key) / MANIFEST).exists())
    contents = Contents(tuple(manifests), len(records), sum(wanted.values()), had)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=None if dry_run else store.root) as folder:
        for sha256, size_bytes in wanted.items():
            _unpack(archive, sha256, size_bytes, Path(folder) / sha256)
        if dry_run:
            return contents
        for sha256 in wanted:
            target = layer.blob(sha256)
            make_folder(target.parent)
            os.replace(Path(folder) / sha256, target)
    for name, data in records.items():
        if not (store.root / name).exists():
            store.write_record(data, *name.split("/"))
    for one in manifests:
        if one.key not in had:
            store.keep_manifest(one)
    return contents


def _named(store: Store, archive: zipfile.ZipFile) -> tuple[list[Manifest], set[str], dict[str, Any]]:
    """The archive's manifests, names of blobs, and records. Raises ManifestError for anything else in it."""
    manifests, blobs, records = [], set[str](), dict[str, Any]()
    names = [info.filename for info in archive.infolist()]
    if len(set(names)) != len(names):
        raise ManifestError("a name is in it twice")
    if CONTENTS not in names or json.loads(_text(archive, CONTENTS))["format"] != FORMAT:
        raise ManifestError(f"it has no {CONTENTS} of a format that this version reads")
    for name in names:
        if found := _ENTRY.fullmatch(name):
            manifest = Manifest.from_json(_text(archive, name))
            if manifest.key != found[1] or Key.of(manifest.factors).digest != manifest.key:
                raise ManifestError(f"{name} isn't the manifest of that key")
            if store.signer is not None:
                store.signer.check(manifest)
            manifests.append(manifest)
        elif found := _BLOB.fullmatch(name):
            blobs.add(found[1])
        elif _RECORD.fullmatch(name):
            records[name] = json.loads(_text(archive, name))
        elif name != CONTENTS:
            raise ManifestError(f"nothing of onegraph's is named {name!r}")
    return manifests, blobs, records


def _text(archive: zipfile.ZipFile, name: str) -> str:
    with archive.open(name) as opened:
        contents = opened.read(_MAX_TEXT + 1)
    if len(contents) > _MAX_TEXT:
        raise ManifestError(f"{name} is too large")
    return contents.decode()


def _unpack(archive: zipfile.ZipFile, sha256: str, size_bytes: int, target: Path) -> None:
    """Unpacks a blob, no more than its manifest says. Raises ManifestError if it isn't what its name says."""
    digest, left = hashlib.sha256(), size_bytes
    with archive.open(f"blobs/{sha256}") as source, target.open("xb") as file:
        while chunk := source.read(1 << 20):
            left -= len(chunk)
            if left < 0:
                raise ManifestError(f"the blob {sha256[:12]} is larger than its manifest says")
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if left or digest.hexdigest() != sha256:
        raise ManifestError(f"the blob {sha256[:12]} doesn't have the checksum that is its name")


def _chosen(key: str, found: dict[str, Layer]) -> str:
    fitting = [digest for digest in found if digest.startswith(key)]
    if len(fitting) != 1 or not key:
        raise ConfigError(
            f"{len(fitting) or 'no'} artifacts have a key that begins with {key!r}",
            where="--key",
            hint="`onegraph cache ls` lists them",
        )
    return fitting[0]


def _all_records(store: Store) -> Iterator[tuple[str, Any]]:
    for layer in store.layers:
        for path in sorted((layer.folder / "autotuned").rglob("*.json")):
            name = path.relative_to(layer.folder).as_posix()
            data = store.read_record(*name.split("/")) if _RECORD.fullmatch(name) else None
            if data is not None:
                yield name, data


def _records_of(store: Store, manifests: Sequence[Manifest]) -> Iterator[tuple[str, Any]]:
    """The choices under which autotuned entries were compiled, without which they aren't found."""
    for manifest in manifests:
        asked = manifest.factors.get("autotuned")
        if not isinstance(asked, dict):
            continue
        piece = Key.of({name: value for name, value in manifest.factors.items() if name != "autotuned"}).digest
        wanted = [("pieces", piece), *(("choices", digest) for digest in asked if SHA256.fullmatch(digest))]
        for kind, digest in wanted:
            data = store.read_record("autotuned", kind, digest[:2], f"{digest}.json")
            if data is not None:
                yield f"autotuned/{kind}/{digest[:2]}/{digest}.json", data
