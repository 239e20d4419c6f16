"""Files that appear whole, by a rename, or not at all; and JSON in them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onegraph.log import get_logger

log = get_logger(__name__)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it that aren't there, whatever the umask, for the owner alone. Raises OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def put(path: Path, contents: bytes) -> None:
    """Writes a file, and its folder for the owner alone. Raises OSError, and then leaves nothing behind."""
    make_folder(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with all in it, as far as that is possible."""
    try:
        path.unlink()
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def put_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder with files, which appears whole; one that another process has put there first stays.

    Raises OSError.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-", ignore_cleanup_errors=True) as temporary:
        whole = Path(temporary) / path.name
        whole.mkdir(mode=0o700)
        for name, contents in files.items():
            put(whole / name, contents)
        try:
            whole.rename(path)
        except OSError:
            if not path.is_dir():
                raise


def read_json(path: Path) -> Any:
    """What the file says; None if there is none, or it can't be read."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s can't be read: %s", path, error)
        return None


def write_json(path: Path, data: Any) -> None:
    """Writes it for people to read, if the disk takes it."""
    try:
        put(path, (json.dumps(data, indent=1) + "\n").encode())
    except OSError as error:
        log.warning("%s couldn't be kept: %s", path, error)
