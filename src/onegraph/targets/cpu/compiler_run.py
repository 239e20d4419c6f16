"""One run of the C++ compiler, which goes on beside its caller until its files are asked for."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onegraph.counters import counters
from onegraph.errors import CompileError

SOURCE, LIBRARY = "kernels.cpp", "kernels.so"
_ERRORS = "errors.txt"


class CompilerRun:
    """Compiles C++ text to a shared library; `where` says of what, in an error. Raises CompileError when made, too.

    `machine_flags` are as for `toolchain.compile_command`.
    """

    def __init__(self, text: str, flags: Sequence[str], where: str, machine_flags: Sequence[str] = ()) -> None:
        self._text, self._where = text, where
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="onegraph-build-")
            folder = Path(self._folder.name)
            (folder / SOURCE).write_text(text)
            errors = (folder / _ERRORS).open("wb")  # a pipe that nobody reads would stop the compiler
        except OSError as error:
            raise CompileError(
                f"the sources can't be written: {error}", where=where, hint=f"make room in {tempfile.gettempdir()}"
            ) from error
        from onegraph.torch_compat import toolchain  # imports Inductor, which takes a second

        command, self._library = toolchain.compile_command([str(folder / SOURCE)], "kernels", folder, machine_flags)
        counters.add("gxx_runs")
        try:
            with errors:
                self._process = subprocess.Popen(
                    [*command, *flags], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, cwd=folder
                )
        except OSError as error:  # it was there when its version was asked for
            self._folder.cleanup()
            raise no_compiler(error) from error

    def files(self) -> dict[str, bytes]:
        """Source and library, when the compiler is done. Raises CompileError with its own words."""
        try:
            status = self._process.wait()
            if status != 0:
                raise self._failed(status)
            return {SOURCE: self._text.encode(), LIBRARY: self._library.read_bytes()}
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends the compiler if it still runs, and removes what it was given."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def _failed(self, status: int) -> CompileError:
        lines = (Path(self._folder.name) / _ERRORS).read_text(errors="replace").splitlines()
        errors = [line for line in lines if "error" in line] or lines
        return CompileError(
            f"the C++ compiler failed with exit code {status}: " + " | ".join(errors[:3]),
            where=self._where,
            hint="run `onegraph doctor`; -O.backend=aot_eager or --enforce-eager runs without it",
        )


class NothingToBuild:
    """The build of a piece without kernels."""

    def files(self) -> dict[str, bytes]:
        """No files."""
        return {}

    def cancel(self) -> None:
        """There is nothing to end."""


def no_compiler(error: Exception) -> CompileError:
    """The error that says how to get a compiler."""
    return CompileError(
        f"there is no working C++ compiler: {error}",
        where="building the kernels of a piece",
        hint="install g++ (Debian, Ubuntu: apt-get install g++), or use --enforce-eager, which needs none",
    )
