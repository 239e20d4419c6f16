"""What the store holds, as records: `onegraph cache ls`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from onegraph.store.layer import Layer
from onegraph.store.manifest import Manifest, ManifestError
from onegraph.store.store import Store


@dataclass(frozen=True)
class Entry:
    """One entry; times are UTC in ISO 8601. `problem` says why its manifest can't be read, and then little is known."""

    key: str
    layer: str
    """`root` or `base`."""
    kind: str
    created: str | None
    last_used: str | None
    seconds: float
    """What compiling it took."""
    size_bytes: int
    """Of its files, which other entries may share."""
    what: str
    signed: bool
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def entries(store: Store) -> list[Entry]:
    """All entries of all layers, newest first. Only manifests are read; nothing is verified."""
    found = [_entry(layer, digest) for layer in store.layers for digest in layer.digests()]
    return sorted(found, key=lambda one: (one.created or "", one.key), reverse=True)


def _entry(layer: Layer, digest: str) -> Entry:
    used = layer.last_used(digest)
    last_used = datetime.fromtimestamp(used, UTC).isoformat(timespec="seconds") if used else None
    try:
        manifest = layer.manifest(digest)
    except (ManifestError, OSError) as error:
        return Entry(digest, layer.name, "bad", None, last_used, 0.0, 0, "", False, str(error))
    return Entry(
        key=digest,
        layer=layer.name,
        kind=manifest.kind,
        created=manifest.created,
        last_used=last_used,
        seconds=manifest.seconds,
        size_bytes=manifest.size_bytes,
        what=described(manifest),
        signed=manifest.signature is not None,
    )


def described(manifest: Manifest) -> str:
    """What an entry is, in a few words; facts that aren't as we write them are left out."""
    facts, factors = manifest.facts, manifest.factors
    words = [
        f"{facts[name]} {text}" for name, text in (("num_ops", "ops"), ("num_kernels", "kernels")) if name in facts
    ]
    region = factors.get("region")
    if isinstance(region, dict) and isinstance(region.get("ranges"), list):
        bounds = [f"{one[0]}..{one[1]}" for one in region["ranges"] if isinstance(one, list) and len(one) == 2]
        words += [f"sizes {' x '.join(bounds)}"] if bounds else []
    target = factors.get("target")
    if isinstance(target, dict):
        words += [" ".join(str(target[name]) for name in ("name", "isa") if name in target)]
        words += [f"{target['threads']} threads"] if "threads" in target else []
    elif isinstance(target, str):
        words.append(target)
    words += [f"of {factors['trace']}"] if isinstance(factors.get("trace"), str) else []
    torch = factors.get("torch")
    words += [f"torch {torch['version']}"] if isinstance(torch, dict) and "version" in torch else []
    return ", ".join(words)
