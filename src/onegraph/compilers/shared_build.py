"""One build for the kernels of several pieces: nearly all of the C++ compiler's time goes into torch's headers.

Takes lowered pieces; gives each of them the files of the library that has its kernels. A kernel's name is made of its
source, so that equal ones are built once. Each artifact keeps the library among its own files: editing or recompiling
one changes no other, and the store keeps equal files once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onegraph.compilers.inductor import Compilation
from onegraph.errors import CompileError
from onegraph.ir.target import KernelBuild, Target


class SharedBuild:
    """Runs beside the caller until it is asked for files. Raises CompileError where there is no toolchain."""

    def __init__(self, target: Target, compilations: Sequence[Compilation]) -> None:
        kernels = {kernel.name: kernel for one in compilations for kernel in one.kernels}
        self._target, self._num_pieces = target, sum(bool(one.kernels) for one in compilations)
        self._build: KernelBuild | None = target.start_build(list(kernels.values()))
        self._files: Mapping[str, bytes] | None = None

    def files_for(self, compilation: Compilation) -> Mapping[str, bytes]:
        """Waits for the end; no files for a piece without kernels. Raises CompileError for this piece's kernels.

        Where the build of several pieces fails, each is built alone, so that the error is about the one that caused it.
        """
        if not compilation.kernels:
            return {}
        if self._build is not None:
            build, self._build = self._build, None
            try:
                self._files = build.files()
            except CompileError:
                if self._num_pieces == 1:
                    raise
        return self._target.start_build(compilation.kernels).files() if self._files is None else self._files

    def cancel(self) -> None:
        """Ends it, if it still runs."""
        if self._build is not None:
            self._build.cancel()
