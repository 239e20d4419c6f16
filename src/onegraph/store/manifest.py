"""The manifest of an entry: one JSON file that says what the entry is, what it was made of, and its files."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from onegraph.ir.artifact import Artifact, OutputAlias, OutputLayout
from onegraph.ir.ledger import ShapeEntry

FORMAT = 6
SHA256 = re.compile(r"[0-9a-f]{64}")
"""What a key and the name of a blob look like: from nothing else a path is made."""


class ManifestError(Exception):
    """The text isn't a manifest of a format that this version reads."""


@dataclass(frozen=True)
class FileRecord:
    """A file of the entry: the sha256 (hex) of its contents, by which its blob is named, and its size."""

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if not SHA256.fullmatch(self.sha256) or self.size_bytes < 0:
            raise ValueError(f"{self.sha256[:70]!r} of {self.size_bytes} bytes is no file")


KINDS = {"graph": "piece", "op_kernels": "op kernels", "trace": "trace"}
"""A factor of a key that only this kind of entry has, and the kind."""


@dataclass(frozen=True)
class Manifest:
    """See the fields; `factors` are those of the key, `created` is UTC in ISO 8601, `signature` that of `signing`."""

    key: str
    factors: dict[str, Any]
    created: str
    seconds: float
    files: dict[str, FileRecord]
    aliases: tuple[OutputAlias, ...]
    layouts: tuple[OutputLayout, ...]
    aligned_inputs: tuple[int, ...]
    mutates_inputs: bool
    constraints: tuple[ShapeEntry, ...]
    guards: str | None
    facts: dict[str, Any]
    signature: str | None = None

    @property
    def kind(self) -> str:
        """What it is an entry of, by what its key is made of."""
        return next((name for factor, name in KINDS.items() if factor in self.factors), "other")

    @property
    def size_bytes(self) -> int:
        """What its files take, also where it shares them with other entries."""
        return sum(record.size_bytes for record in self.files.values())

    @classmethod
    def of(cls, artifact: Artifact, files: dict[str, FileRecord]) -> Manifest:
        return cls(
            key=artifact.key.digest,
            factors=artifact.key.factors,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(artifact.seconds, 3),
            files=files,
            aliases=artifact.aliases,
            layouts=artifact.layouts,
            aligned_inputs=artifact.aligned_inputs,
            mutates_inputs=artifact.mutates_inputs,
            constraints=artifact.constraints,
            guards=artifact.guards,
            facts=dict(artifact.facts),
        )

    def to_json(self) -> str:
        """With a checksum of all else in it."""
        data = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        return json.dumps({**data, "checksum": _checksum(data)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ManifestError for anything but a whole manifest of this format."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ManifestError("written by another version of onegraph")
            if data.pop("checksum") != _checksum(data):
                raise ManifestError("it doesn't have the checksum that it was written with")
            del data["format"]
            data["files"] = {_name(name): FileRecord(**record) for name, record in data["files"].items()}
            data["aliases"] = tuple(OutputAlias(**alias) for alias in data["aliases"])
            data["layouts"] = tuple(OutputLayout(one["output"], tuple(one["order"])) for one in data["layouts"])
            data["aligned_inputs"] = tuple(data["aligned_inputs"])
            data["constraints"] = tuple(ShapeEntry(**entry) for entry in data["constraints"])
            manifest = cls(**data)
            if datetime.fromisoformat(manifest.created).tzinfo is None or not manifest.seconds >= 0:
                raise ManifestError("its time is none")
            if not isinstance(manifest.factors, dict) or not isinstance(manifest.facts, dict):
                raise ManifestError("its factors or facts are no object")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"unreadable: {error}") from error


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _name(name: str) -> str:
    """A name of a file, which may be used as one."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise ManifestError(f"{name!r} is no name for a file")
    return name
