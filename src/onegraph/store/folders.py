"""The folders of the store: whose they are, who else can write them, and how a root is known as ours.

Loading an artifact runs code, so a folder that another user can write is refused.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from onegraph.errors import ArtifactError
from onegraph.store.files import make_folder, put

LAYOUT = ("entries", "blobs", "locks", "autotuned", "quarantine", "index", "unpacked")
"""All that a root holds, beside its marker."""
MARKER = "CACHEDIR.TAG"
"""Backup programs leave out a folder with such a file: https://bford.info/cachedir/"""
_MARK = "Signature: 8a477f597d28d172789f06886806bc55\n# This is a compile cache of onegraph; it may be removed.\n"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_root(root: Path, *, make: bool) -> None:
    """Raises ArtifactError if it can't be made or written, or others can write it."""
    try:
        if make:
            make_folder(root)
        facts = root.stat()
    except OSError as error:
        raise ArtifactError(
            f"the cache root {root} can't be {'made' if make else 'read'}: {error.strerror}",
            where=str(root),
            hint="set ONEGRAPH_CACHE_ROOT to a folder of yours, or ONEGRAPH_DISABLE_COMPILE_CACHE=1",
        ) from error
    if facts.st_uid != os.geteuid() or facts.st_mode & _OTHERS_WRITE:
        raise ArtifactError(
            f"the cache root {root} can be written by other users, and artifacts are code",
            where=f"owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):04o}",
            hint=f"chown {os.geteuid()} {root} && chmod 700 {root}; "
            "one that is only to be read goes into ONEGRAPH_CACHE_BASE",
        )
    if not os.access(root, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"the cache root {root} is not writable",
            where=f"mode {stat.S_IMODE(facts.st_mode):04o}",
            hint=f"chmod 700 {root}; or ONEGRAPH_CACHE_BASE={root}, which is only read, with another "
            "ONEGRAPH_CACHE_ROOT; or ONEGRAPH_DISABLE_COMPILE_CACHE=1",
        )


def check_base(base: Path, root: Path) -> None:
    """Raises ArtifactError if it isn't there, is the root, or others can write it."""
    where = f"ONEGRAPH_CACHE_BASE={base}"
    try:
        facts = base.stat()
        if not stat.S_ISDIR(facts.st_mode):
            raise NotADirectoryError(None, "it is no folder")
        if not os.access(base, os.R_OK | os.X_OK):
            raise PermissionError(None, "it is for others alone")
    except OSError as error:
        raise ArtifactError(
            f"the base of the compile cache can't be read: {error.strerror}",
            where=where,
            hint=f"name a folder that has such a cache, or leave it out; chmod -R a+rX {base} lets all read it",
        ) from error
    with contextlib.suppress(OSError):
        if base.samefile(root):
            raise ArtifactError(
                "the base of the compile cache is its root",
                where=where,
                hint="the base is only read: set ONEGRAPH_CACHE_ROOT to another folder, or leave the base out",
            )
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & _OTHERS_WRITE:
        raise ArtifactError(
            "the base of the compile cache can be written by other users, and artifacts are code",
            where=f"{where}, owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):04o}",
            hint=f"chown -R root {base} && chmod -R go-w {base}",
        )


def mark_root(root: Path) -> None:
    """Marks a root that holds nothing but ours, so that it can be told from a folder that was named by mistake."""
    with contextlib.suppress(OSError):
        if not (root / MARKER).exists() and not foreign(root):
            put(root / MARKER, _MARK.encode())


def is_ours(root: Path) -> bool:
    """Whether the folder is a root: it has our mark, or holds nothing but what a root holds."""
    try:
        return (root / MARKER).read_text() == _MARK
    except (OSError, ValueError):
        return not foreign(root)


def foreign(root: Path) -> list[str]:
    """The names in a folder that a root doesn't have. Raises OSError."""
    return sorted(path.name for path in root.iterdir() if path.name not in (*LAYOUT, MARKER) and not _is_left(path))


def _is_left(path: Path) -> bool:
    """What a process that died while it wrote has left."""
    return path.name.startswith(".writing-")
