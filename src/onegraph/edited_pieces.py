"""A piece's artifact as files that people edit: unpacked, and loaded with what they changed.

Takes an artifact's verified files; gives the callable, and which files of its folder were edited. Edited C++ or Triton
is built into the folder, never into the store; an edited wrapper runs from its file, so that tracebacks and debuggers
show the file and its lines. An edit that can't be built or loaded is an error: the original never stands in for it.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onegraph.compilers import loading
from onegraph.compilers.wrapper import kernel_names
from onegraph.errors import ArtifactError, CompileError, OnegraphError
from onegraph.ir.artifact import PieceCallable
from onegraph.ir.target import Target
from onegraph.log import get_logger
from onegraph.store.files import put_folder
from onegraph.store.unpacked import README, USE_EDITS, Edits, built_of, unpack

log = get_logger(__name__)

_DISTRIBUTED_BREAKPOINT = re.compile(
    r"\b(?:distributed|dist)\.breakpoint\b|from torch\.distributed import .*\bbreakpoint\b"
)
_TO_DO = "correct it, or delete the file: the next start writes it as it was"
_FOR_READING = "# The piece's graph, for reading: edits here change nothing.\n"


@dataclass(frozen=True)
class LoadedCode:
    """A piece's callable; `edits` tells what of it was edited, None where nothing was."""

    call: PieceCallable
    edits: Edits | None = None

    @property
    def why(self) -> str:
        """Empty where nothing was edited."""
        return "" if self.edits is None else f"edited: {', '.join(self.edits.files)}"

    @property
    def notes(self) -> tuple[str, ...]:
        """A line on what was edited."""
        return () if self.edits is None else (f"piece {self.edits.piece} runs edited code: {self.edits}",)


def load_unpacked(
    files: Mapping[str, Path],
    facts: loading.LoadingFacts,
    target: Target,
    root: Path,
    key: str,
    piece: int,
    factors: Mapping[str, Any],
) -> LoadedCode:
    """Loads an artifact from its folder below the store's root, which is written where it isn't there.

    Raises ArtifactError for a folder that can't be written and for an edit that can't be loaded, CompileError for one
    that can't be built. An artifact that isn't edited raises what `loading.load_artifact` raises.
    """
    wrapper = files[loading.WRAPPER].read_text()
    names = kernel_names(wrapper)
    kernels = target.kernel_sources(files, names)
    sources = {loading.WRAPPER: wrapper, **kernels}
    graph = files[loading.GRAPH].read_text().strip("\n")
    shown = {README: _readme(piece, key, factors, list(sources)), loading.GRAPH: f"{_FOR_READING}{graph}\n"}
    edits = unpack(root, key, piece, factors, sources, shown)
    loaded = {**files, loading.WRAPPER: edits.folder / loading.WRAPPER}
    if not edits.files:
        return LoadedCode(loading.load_artifact(loaded, facts, target, shows_file=True))
    try:
        if any(name in kernels for name in edits.files):
            loaded.update(_built(files, names, {name: edits.folder / name for name in kernels}, edits, target))
        if _DISTRIBUTED_BREAKPOINT.search(loaded[loading.WRAPPER].read_text()):
            _have_process_group()
        as_written = loading.WRAPPER in edits.files
        call = loading.load_artifact(loaded, facts, target, shows_file=True, as_written=as_written)
    except OnegraphError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"edited code can't be loaded: {type(error).__name__}: {error}",
            where=_place(error, loaded[loading.WRAPPER]),
            hint=_TO_DO,
        ) from error
    return LoadedCode(call, edits)


def _built(
    files: Mapping[str, Path],
    names: Mapping[str, str],
    sources: Mapping[str, Path],
    edits: Edits,
    target: Target,
) -> dict[str, Path]:
    """The files that take the place of the artifact's own; the compiler runs once for a text."""
    folder = built_of(edits, sources)
    if not folder.is_dir():
        changed = {name: path for name, path in sources.items() if name in edits.files or path.suffix == ".py"}
        try:
            put_folder(folder, target.build_edited(files, names, changed))
        except CompileError as error:
            places = (re.search(rf"{re.escape(str(path))}(:\d+)?", error.message) for path in changed.values())
            place = next((found[0] for found in places if found), error.where)
            raise CompileError(error.message.replace(" | ", "\n    "), where=place, hint=_TO_DO) from error
        except OSError as error:
            raise ArtifactError(
                f"what was built of an edit can't be written: {error.strerror or error}", where=str(folder)
            ) from error
    return {path.name: path for path in folder.iterdir()}


def _place(error: Exception, path: Path) -> str:
    """The file, with the line where it is known."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path.parent)


def _have_process_group() -> None:
    """Makes a process group of this process alone, if there is none: `torch.distributed.breakpoint()` waits in one."""
    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        return
    folder = tempfile.mkdtemp(prefix="onegraph-one-rank-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    except Exception as error:
        raise ArtifactError(
            f"there is no process group for torch.distributed.breakpoint(), and none can be made: {error}",
            hint="call breakpoint() instead, which needs none",
        ) from error
    log.warning("edited code calls torch.distributed.breakpoint(): made a process group of one rank for it")


def _readme(piece: int, key: str, factors: Mapping[str, Any], sources: list[str]) -> str:
    ranges = (factors.get("region") or {}).get("ranges", [])
    sizes = f", for sizes {' and '.join(f'{least}..{most}' for least, most in ranges)}" if ranges else ""
    kernels = ", ".join(f"`{name}`" for name in sources[1:])
    return f"""# Piece {piece}, as it was compiled{sizes}

- `{sources[0]}`: the Python that runs for each call: it allocates, and calls the kernels.
{f"- {kernels}: the kernels." if kernels else "- It has no kernels of its own."}
- `{loading.GRAPH}`: the graph that was compiled, with the model's lines as comments. For reading only.

To edit: change {" or ".join(f"`{name}`" for name in sources)}, and start again with `{USE_EDITS}`.
The start then says that edited code runs; changed kernels are built anew. A print, a `breakpoint()` or
another constant are all fine. Equal pieces share this folder: `onegraph explain` lists them.

To undo: delete the file, and the next start writes it as it was. Edits belong to this graph, compiled with these
options on this machine; at the start of another one they are listed, and not used. The key of all that is
{key}.
"""
