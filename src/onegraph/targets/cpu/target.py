"""The CPU as a target: its fingerprint, and its kernels built by g++ and loaded as a Python extension."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onegraph.counters import counters
from onegraph.errors import CompileError
from onegraph.ir.target import KernelSource
from onegraph.targets.cpu import attention
from onegraph.targets.cpu.library import MODULE, library_source
from onegraph.torch_compat import toolchain

SOURCE, LIBRARY = "kernels.cpp", "kernels.so"


class CpuTarget:
    """Kernels are C++ for the native instruction set, with OpenMP over the number of threads at compile time."""

    name = "cpu"
    dispatch_key = "CPU"

    def fingerprint(self) -> dict[str, Any]:
        """What the CPU can do, and the number of threads: both are baked into the code. Runs no compiler.

        The compiler isn't part of it: what it made runs as well on a host that has another one, or none.
        """
        return {
            "isa": torch.backends.cpu.get_cpu_capability(),
            "cpu_flags": toolchain.cpu_flags(),
            "threads": torch.get_num_threads(),
        }

    def required_alignment(self, itemsize: int) -> int:
        """Generated code loads unaligned vectors, so each element only has to stand at its own size."""
        return itemsize

    def compiler_options(self) -> dict[str, Any]:
        """The instruction set is believed as declared, instead of probed by compiling test programs."""
        return {"cpp.vec_isa_ok": True, "force_disable_caches": True}

    def check_toolchain(self) -> None:
        """Raises CompileError where no C++ compiler answers."""
        try:
            toolchain.compiler_version(toolchain.cpp_compiler())
        except toolchain.ToolchainMissingError as error:
            raise _no_compiler(error) from error

    def build_kernels(self, kernels: Sequence[KernelSource]) -> dict[str, bytes]:
        """One library of all kernels; no files for a piece without kernels. Raises CompileError."""
        if not kernels:
            return {}
        return self._build(library_source(kernels), "building the kernels of a piece")

    def op_kernel_factors(self) -> dict[str, Any]:
        """Source, flags with what torch derives more of them from, and the machine; not the number of threads."""
        return {
            "source": hashlib.sha256(attention.library_source().encode()).hexdigest(),
            "flags": list(attention.FLAGS),
            "torch": torch.__version__,
            "inductor": toolchain.flag_settings(),
            "cpu_flags": toolchain.cpu_flags(),
        }

    def build_op_kernels(self) -> dict[str, bytes]:
        """The library of `attention.cpp`. Raises CompileError."""
        return self._build(attention.library_source(), "building the attention kernel", attention.FLAGS)

    def load_op_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Callable[..., Any]]:
        """The ops of `targets/cpu/attention.py`."""
        return attention.implementations(self.load_kernels(files))

    def _build(self, text: str, where: str, flags: Sequence[str] = ()) -> dict[str, bytes]:
        self.check_toolchain()
        with tempfile.TemporaryDirectory(prefix="onegraph-build-") as folder:
            source = Path(folder) / SOURCE
            source.write_text(text)
            command, library = toolchain.compile_command([str(source)], "kernels", Path(folder))
            self._run([*command, *flags], folder, where)
            return {SOURCE: text.encode(), LIBRARY: library.read_bytes()}

    def _run(self, command: list[str], folder: str, where: str) -> None:
        counters.add("gxx_runs")
        try:
            result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        except OSError as error:  # it was there when its version was asked for
            raise _no_compiler(error) from error
        if result.returncode != 0:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise CompileError(
                f"the C++ compiler failed with exit code {result.returncode}: " + " | ".join(errors[:3]),
                where=where,
                hint="run `onegraph doctor`; -O.backend=aot_eager or --enforce-eager runs without it",
            )

    def load_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Any]:
        """The library's functions by kernel name; an empty mapping where a piece has no kernels."""
        if LIBRARY not in files:
            return {}
        # The loader finds PyInit_<last part of the name>; the first part keeps libraries apart in tracebacks.
        loader = importlib.machinery.ExtensionFileLoader(f"onegraph_artifact.{MODULE}", str(files[LIBRARY]))
        spec = importlib.util.spec_from_loader(loader.name, loader, origin=str(files[LIBRARY]))
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        module.bind(toolchain.tensor_data_pointer_function())
        return vars(module)


def _no_compiler(error: Exception) -> CompileError:
    return CompileError(
        f"there is no working C++ compiler: {error}",
        where="building the kernels of a piece",
        hint="install g++ (Debian, Ubuntu: apt-get install g++), or use --enforce-eager, which needs none",
    )
