"""Unpacked artifacts: a folder of readable sources for each key, and what of them was edited.

    ROOT/unpacked/piece_3-3f2a…/README.md       how to edit, and what happens next
    ROOT/unpacked/piece_3-3f2a…/wrapper.py …    sources, which the caller names: edits of these are used
    ROOT/unpacked/piece_3-3f2a…/graph.py …      what is shown beside: edits of these change nothing
    ROOT/unpacked/piece_3-3f2a…/built/12…/      what was built of edited sources, by their digest
    ROOT/unpacked/piece_3-3f2a…/original.json   the key, its factors, and the checksums as files were written

A file is edited if its checksum is another than the recorded one. Edits are never overwritten; a file that was deleted
is written anew. Nothing else in the store depends on a folder here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onegraph.errors import ArtifactError
from onegraph.ir.artifact import CompiledPiece
from onegraph.log import get_logger
from onegraph.store.files import put, read_json

log = get_logger(__name__)

UNPACKED, README = "unpacked", "README.md"
USE_EDITS = "-O.compile_cache_save_format=unpacked"
_RECORD, _BUILT = "original.json", "built"
_SHOWN_KEY = 16
"""Digits of the key in a folder's name."""
_IN_WORDS = {
    "graph": "the graph",
    "region": "the sizes that it is for",
    "compiler": "Inductor's options",
    "onegraph": "onegraph's code",
    "python": "Python",
    "torch": "torch",
    "target": "the machine or its number of threads",
}
"""The factors of a piece's key."""


@dataclass(frozen=True)
class Edits:
    """The edited files of one folder, by name; `piece` and `key` are what it was unpacked for, `factors` the key's."""

    folder: Path
    files: tuple[str, ...]
    piece: int | None = None
    key: str = ""
    factors: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return f"{', '.join(self.files)} in {self.folder}"


def unpack(
    root: Path, key: str, piece: int, factors: Mapping[str, Any], sources: Mapping[str, str], shown: Mapping[str, str]
) -> Edits:
    """Has a key's folder hold these files, but for those that were edited; tells which of `sources` were.

    Raises ArtifactError where the disk doesn't take it.
    """
    folder = unpacked_folder(root, key) or root / UNPACKED / f"piece_{piece}-{key[:_SHOWN_KEY]}"
    texts = {**sources, **shown}
    originals = {name: _digest(text.encode()) for name, text in texts.items()}
    written = _record(folder).get("files", {})
    edited = [
        name
        for name in texts
        if (present := _digest_of(folder / name)) and present not in (written.get(name), originals[name])
    ]
    try:
        record: dict[str, Any] = {"key": key, "piece": piece, "sources": list(sources), "files": originals}
        record["factors"] = dict(factors)
        if written != originals:  # before the files: one that a killed process left behind is no edit
            put(folder / _RECORD, (json.dumps(record, indent=1) + "\n").encode())
        for name, text in texts.items():
            if name not in edited and _digest_of(folder / name) != originals[name]:
                put(folder / name, text.encode())
    except OSError as error:
        raise ArtifactError(
            f"the artifact of piece {piece} can't be unpacked: {error.strerror or error}",
            where=str(folder),
            hint=f"make room there, or leave {USE_EDITS} out",
        ) from error
    for name in shown.keys() & edited:
        log.warning("%s was edited, and is only for reading: nothing there takes effect", folder / name)
    return Edits(folder, tuple(name for name in edited if name in sources), piece, key, factors)


def unpacked_folder(root: Path, key: str) -> Path | None:
    """The folder that a key was unpacked to; None where it wasn't."""
    return min((root / UNPACKED).glob(f"*-{key[:_SHOWN_KEY]}"), default=None)


def key_of(folder: Path) -> str | None:
    """The key that a folder was unpacked for; None for one without a record."""
    key = _record(folder).get("key")
    return key if isinstance(key, str) else None


def built_of(edits: Edits, sources: Iterable[str]) -> Path:
    """The folder for what is built of these sources of an unpacked folder, as they are now."""
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + (edits.folder / name).read_bytes())
    return edits.folder / _BUILT / digest.hexdigest()[:_SHOWN_KEY]


def edits(root: Path) -> list[Edits]:
    """The folders in which something was edited. What has no record counts as edited."""
    found = []
    for folder in _folders(root):
        record = _record(folder)
        written = record.get("files", {})
        names = record.get("sources") or sorted(path.name for path in folder.iterdir() if path.is_file())
        changed = tuple(name for name in names if _digest_of(folder / name) not in (None, written.get(name)))
        if changed:
            found.append(Edits(folder, changed, record.get("piece"), record.get("key", ""), record.get("factors")))
    return found


def remove_edits(root: Path) -> list[Path]:
    """Removes all unpacked folders, edited or not; gives their paths. The artifacts themselves stay."""
    removed = list(_folders(root))
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        (root / UNPACKED).rmdir()
    return removed


def tell_edits(
    root: Path, pieces: Iterable[tuple[int, CompiledPiece]], *, are_used: bool, is_whole: bool = True
) -> None:
    """Logs, a line each, what a start makes of edits: which pieces run edited code, and which edits aren't used.

    `pieces` were compiled or loaded, and have these numbers. Edits of other graphs are listed where edits are asked
    for and the pieces are those of a whole model.
    """
    found = edits(root)
    if not found:
        return
    numbers: dict[str, list[int]] = {}
    for index, piece in pieces:
        if piece.key is not None and index not in numbers.setdefault(piece.key, []):
            numbers[piece.key].append(index)
    ours = [one for one in found if one.key in numbers]
    if not are_used:
        if ours:
            log.warning("edits aren't used (%s uses them): %s", USE_EDITS, "; ".join(map(str, ours)))
        return
    for one in ours:
        several = "pieces" if len(numbers[one.key]) > 1 else "piece"
        log.warning("%s %s: edited code runs: %s", several, ", ".join(map(str, numbers[one.key])), one)
    if not is_whole:
        return
    present = map(_record, _folders(root))
    current = [record for record in present if record.get("key") in numbers]
    for one in found:
        if one not in ours:
            files = ", ".join(one.files)
            log.warning("edits in %s (%s) belong to another graph: %s", one.folder, files, _difference(one, current))


def _difference(orphan: Edits, current: list[dict[str, Any]]) -> str:
    """What differs between the key that edits were made for and the nearest of today's."""
    if orphan.factors is None or not current:
        return "no piece of this start has their key"
    differing = [
        [name for name in _IN_WORDS if orphan.factors.get(name) != record["factors"].get(name)]
        for record in sorted(current, key=lambda record: record["piece"] != orphan.piece)
    ]
    fewest = min(differing, key=len)
    return f"of piece {orphan.piece}; what differs now: {', '.join(_IN_WORDS[name] for name in fewest)}"


def _folders(root: Path) -> Iterator[Path]:
    place = root / UNPACKED
    if place.is_dir():
        yield from sorted(path for path in place.iterdir() if path.is_dir())


def _record(folder: Path) -> dict[str, Any]:
    """Empty where there is none that can be read."""
    record = read_json(folder / _RECORD)
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else {}


def _digest_of(path: Path) -> str | None:
    try:
        return _digest(path.read_bytes())
    except OSError:
        return None


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()
