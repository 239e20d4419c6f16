"""A Key is the digest of what is handed to a compiler, with the readable factors that it was made of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """`digest` is the sha256 (hex) of the canonical JSON of `factors`; equal factors mean equal keys.

    `graph` is the text of which the factor of that name is the digest, to tell how two graphs differ; empty where there
    is none.
    """

    digest: str
    factors: dict[str, Any]
    graph: str = ""

    @classmethod
    def of(cls, factors: dict[str, Any], graph: str = "") -> Key:
        """Raises TypeError for a factor that JSON cannot hold: such a thing has no stable identity."""
        text = json.dumps(factors, sort_keys=True, separators=(",", ":"))
        return cls(hashlib.sha256(text.encode()).hexdigest(), factors, graph)


@dataclass(frozen=True)
class Unkeyable:
    """The reason why something has no stable identity, and so can never be stored."""

    reason: str
