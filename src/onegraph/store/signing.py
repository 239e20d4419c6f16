"""Signatures of manifests: HMAC-SHA256 with a key from a file, for a store that others hand you.

A manifest names all files of its entry by sha256, so its signature covers them too. It is computed over the manifest's
canonical JSON without the signature itself.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from dataclasses import replace
from pathlib import Path

from onegraph.errors import ArtifactError
from onegraph.store.manifest import Manifest, ManifestError

MIN_BYTES = 16


class UnsignedError(Exception):
    """The manifest has no signature, and one is asked for."""


class Signer:
    """Signs manifests and checks their signatures."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def of_file(cls, path: Path) -> Signer:
        """With the file's contents as the key. Raises ArtifactError for a file that others can read, or a short one."""
        where = f"ONEGRAPH_CACHE_KEY_FILE={path}"
        try:
            with path.open("rb") as file:
                facts, key = os.fstat(file.fileno()), file.read()
        except OSError as error:
            raise ArtifactError(
                f"the key of the compile cache can't be read: {error.strerror}",
                where=where,
                hint=f"make one: (umask 077; head -c 32 /dev/urandom > {path})",
            ) from error
        if facts.st_uid not in (0, os.geteuid()) or stat.S_IMODE(facts.st_mode) & 0o077:
            raise ArtifactError(
                "the key of the compile cache can be read or written by other users, so its signatures say nothing",
                where=f"{where}, owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):04o}",
                hint=f"chown {os.geteuid()} {path} && chmod 600 {path}; and make another key if it was seen",
            )
        if len(key) < MIN_BYTES:
            raise ArtifactError(
                f"the key of the compile cache has {len(key)} bytes, and {MIN_BYTES} are the least",
                where=where,
                hint=f"make one: (umask 077; head -c 32 /dev/urandom > {path})",
            )
        return cls(key)

    def signed(self, manifest: Manifest) -> Manifest:
        return replace(manifest, signature=self._signature(manifest))

    def check(self, manifest: Manifest) -> None:
        """Raises UnsignedError for a manifest without a signature, ManifestError for one with another."""
        if manifest.signature is None:
            raise UnsignedError
        if not hmac.compare_digest(str(manifest.signature).encode(), self._signature(manifest).encode()):
            raise ManifestError("its signature isn't that of the key in ONEGRAPH_CACHE_KEY_FILE")

    def _signature(self, manifest: Manifest) -> str:
        text = replace(manifest, signature=None).to_json()
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
