"""Inductor's Triton kernels as one file of an artifact: their sources, and all that Triton made of them.

Takes kernels as Inductor writes them; gives a zip with each kernel's source and the folder in which Triton keeps
cubins. Loading unpacks it and asks Triton for the same kernels again, which finds them compiled.
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onegraph.counters import counters
from onegraph.errors import CompileError
from onegraph.ir.target import KernelBuild, KernelSource
from onegraph.torch_compat import triton_kernels

KERNELS = "triton.zip"
_INDEX, _CACHE = "kernels.json", "cache"
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The time of every file in the zip, so that equal contents are equal bytes."""


class MixedBuild:
    """The build of C++ kernels, which runs already, and of Triton kernels, which runs when files are asked for."""

    def __init__(self, cpp: KernelBuild, triton: Sequence[KernelSource]) -> None:
        self._cpp, self._triton = cpp, triton

    def files(self) -> dict[str, bytes]:
        """Raises CompileError."""
        built = build_triton_kernels(self._triton) if self._triton else {}
        return {**self._cpp.files(), **built}

    def cancel(self) -> None:
        """Ends the C++ compiler; Triton runs only inside of `files`."""
        self._cpp.cancel()


def build_triton_kernels(kernels: Sequence[KernelSource]) -> dict[str, bytes]:
    """Compiles the kernels, for the current device. Raises CompileError with Triton's words."""
    with tempfile.TemporaryDirectory(prefix="onegraph-triton-") as name:
        folder = Path(name)
        functions = {}
        for kernel in kernels:
            (folder / f"{kernel.name}.py").write_text(kernel.source)
            functions[kernel.name] = kernel.function
        (folder / _INDEX).write_text(json.dumps(functions))
        counters.add("triton_builds")
        try:
            _load(folder)
        except Exception as error:
            raise CompileError(
                f"Triton failed: {type(error).__name__}: {str(error)[:500]}",
                where="building the kernels of a piece",
                hint="-O.backend=aot_eager or --enforce-eager runs without Triton; --verbose shows its traceback",
            ) from error
        triton_kernels.add_driver(folder / _CACHE)
        return {KERNELS: _packed(folder)}


def load_triton_kernels(files: Mapping[str, Path]) -> dict[str, Any]:
    """The kernels by the names that the wrapper calls them by; none where the artifact has none."""
    if KERNELS not in files:
        return {}
    with tempfile.TemporaryDirectory(prefix="onegraph-triton-") as name:
        folder = Path(name)
        with zipfile.ZipFile(files[KERNELS]) as packed:
            packed.extractall(folder)
        triton_kernels.move_cache(folder / _CACHE)
        return _load(folder)


def kernel_texts(files: Mapping[str, Path], names: Mapping[str, str]) -> dict[str, str]:
    """The sources of an artifact's kernels of these names, by file name: `NAME.py` for the name in the wrapper."""
    return {f"{names[kernel.name]}.py": kernel.source for kernel in _kernels(files) if kernel.name in names}


def build_edited_kernels(
    files: Mapping[str, Path], names: Mapping[str, str], sources: Mapping[str, Path]
) -> dict[str, bytes]:
    """The zip made of these sources, where they aren't those of the artifact. Raises CompileError."""
    original = kernel_texts(files, names)
    texts = {name: sources[name].read_text() for name in original}
    if texts == original:
        return {}
    kernels = [
        replace(kernel, source=texts[f"{names[kernel.name]}.py"]) for kernel in _kernels(files) if kernel.name in names
    ]
    try:
        return build_triton_kernels(kernels)
    except CompileError as error:
        edited = [str(sources[name]) for name in original if texts[name] != original[name]]
        raise CompileError(error.message, where=", ".join(edited), hint=error.hint) from error


def _kernels(files: Mapping[str, Path]) -> list[KernelSource]:
    if KERNELS not in files:
        return []
    with zipfile.ZipFile(files[KERNELS]) as packed:
        functions: dict[str, str] = json.loads(packed.read(_INDEX))
        return [
            KernelSource(name, (), packed.read(f"{name}.py").decode(), "triton", function)
            for name, function in functions.items()
        ]


def _load(folder: Path) -> dict[str, Any]:
    functions: dict[str, str] = json.loads((folder / _INDEX).read_text())
    return triton_kernels.load(
        {name: (folder / f"{name}.py", function) for name, function in functions.items()}, folder / _CACHE
    )


def _packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and triton_kernels.is_needed(path)):
            packed.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix(), _LONG_AGO), path.read_bytes())
    return buffer.getvalue()
