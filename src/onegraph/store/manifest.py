"""The manifest of an entry: one JSON file that says what the entry is, what it was made of, and its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from onegraph.ir.artifact import Artifact, OutputAlias, OutputLayout
from onegraph.ir.ledger import ShapeEntry

FORMAT = 5


class ManifestError(Exception):
    """The text isn't a manifest of a format that this version reads."""


@dataclass(frozen=True)
class FileRecord:
    """A file of the entry: the sha256 (hex) of its contents, by which its blob is named, and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """See the fields; `factors` are those of the key, `created` is UTC in ISO 8601."""

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
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ManifestError for anything but a whole manifest of this format."""
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ManifestError("written by another version of onegraph")
            data["files"] = {name: FileRecord(**record) for name, record in data["files"].items()}
            data["aliases"] = tuple(OutputAlias(**alias) for alias in data["aliases"])
            data["layouts"] = tuple(OutputLayout(one["output"], tuple(one["order"])) for one in data["layouts"])
            data["aligned_inputs"] = tuple(data["aligned_inputs"])
            data["constraints"] = tuple(ShapeEntry(**entry) for entry in data["constraints"])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"unreadable: {error}") from error
