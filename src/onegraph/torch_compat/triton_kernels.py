"""Inductor's Triton kernels outside of Inductor: compiled into, or loaded from, a folder that the caller names.

A kernel's source is a Python module, as Inductor writes it, whose decorators make an object with `run`. Triton looks
into its cache folder before it compiles; here this folder belongs to one artifact. No kernel is timed: the options
of the CUDA target leave each of them one configuration.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NEEDED = (".py", ".json", ".cubin", ".so")
"""What a later load reads; Triton keeps the stages of its compilation beside."""
_GROUP = "__grp__"


def version() -> str | None:
    """Triton's version; None where it isn't installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def problem() -> str | None:
    """Why Triton can't compile for the current device; None where it can. The first call starts its driver."""
    if importlib.util.find_spec("triton") is None:
        return "it isn't installed"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # noqa: BLE001 - whatever is wrong, its words are the answer
        return f"{type(error).__name__}: {str(error).strip()[:300]}"
    return None


def load(kernels: Mapping[str, tuple[Path, str]], cache: Path) -> dict[str, Any]:
    """The kernels by name, ready to run on the current device; each is given by its source and its function there.

    What isn't in `cache` is compiled into it. Both may be removed afterwards. Raises what Triton raises.
    """
    loaded = {}
    with _cache_in(cache):
        for name, (path, function) in kernels.items():
            namespace: dict[str, Any] = {"__name__": f"onegraph_artifact.{name}", "__file__": str(path)}
            exec(compile(path.read_text(), str(path), "exec"), namespace)  # noqa: S102 - code of an artifact
            loaded[name] = namespace[function]
            loaded[name].precompile()
    return loaded


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Inside, Triton and Inductor's launcher keep what they make in `folder`; the environment is put back at the end.

    Triton's knobs and Inductor's runtime write TRITON_CACHE_DIR on their own (torch 2.11 to 2.13).
    """
    from torch._inductor.runtime import triton_heuristics
    from triton import knobs

    folder.mkdir(parents=True, exist_ok=True)
    place = triton_heuristics.triton_cache_dir
    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        triton_heuristics.triton_cache_dir = lambda device: str(folder)
        try:
            yield
        finally:
            triton_heuristics.triton_cache_dir = place


def is_needed(path: Path) -> bool:
    """Whether a file of a cache folder has to be kept, for kernels to load without being compiled."""
    return path.suffix in _NEEDED


def move_cache(folder: Path) -> None:
    """Has the groups of a cache folder name their files where the folder is now: Triton writes whole paths."""
    for group in folder.rglob(f"{_GROUP}*.json"):
        data = json.loads(group.read_text())
        data["child_paths"] = {name: str(group.parent / name) for name in data["child_paths"]}
        group.write_text(json.dumps(data))


def add_driver(folder: Path) -> None:
    """Puts Triton's own library, which it builds with a C compiler once for a machine, into a cache folder too."""
    found = _driver_library()
    if found is not None:
        path, contents = folder / found[0], found[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)


@functools.cache
def _driver_library() -> tuple[str, bytes] | None:
    """Its place in a cache folder, and its bytes; None where it can't be found (its place is not in Triton's API)."""
    from triton.runtime import driver

    try:
        path = Path(driver.active.utils.load_binary.__self__.__file__)
        return f"{path.parent.name}/{path.name}", path.read_bytes()
    except (AttributeError, OSError, TypeError):
        return None
