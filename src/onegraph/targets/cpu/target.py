"""The CPU as a target: its fingerprint, and its kernels built by g++ and loaded as a Python extension."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onegraph.errors import CompileError
from onegraph.ir.target import KernelBuild, KernelSource
from onegraph.targets.cpu import memory, own_ops
from onegraph.targets.cpu.compiler_run import LIBRARY, SOURCE, CompilerRun, NothingToBuild, no_compiler
from onegraph.targets.cpu.library import MODULE, library_source, only_kernels
from onegraph.torch_compat import cpu_facts
from onegraph.torch_compat.changed_config import cpp_settings


class CpuTarget:
    """Kernels are C++ for the native instruction set, with OpenMP over the number of threads at compile time."""

    name = "cpu"
    dispatch_key = "CPU"
    device_types: tuple[str, ...] = ("cpu",)
    op_kernels_kind = "C++ kernel"
    facts: frozenset[str] = frozenset({"linear_kernels", "rotary_kernel"})
    plans_memory = True

    def fingerprint(self) -> dict[str, Any]:
        """What the CPU can do, and the number of threads: both are baked into the code. Runs no compiler.

        The compiler isn't part of it: what it made runs as well on a host that has another one, or none.
        """
        return {
            "isa": torch.backends.cpu.get_cpu_capability(),
            "cpu_flags": cpu_facts.cpu_flags(),
            "threads": torch.get_num_threads(),
        }

    def required_alignment(self, itemsize: int) -> int:
        """Generated code loads unaligned vectors, so each element only has to stand at its own size."""
        return itemsize

    def available_bytes(self) -> int | None:
        """What the kernel says, within the control group's limit."""
        return memory.available_bytes()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """In an anonymous mapping of its own, whose pages cost memory when they are first written."""
        return memory.zeros_on_demand(shape, dtype)

    def compiler_options(self) -> dict[str, Any]:
        """The instruction set is believed as declared, instead of probed by compiling test programs."""
        return {"cpp.vec_isa_ok": True, "force_disable_caches": True}

    def check_toolchain(self) -> None:
        """Raises CompileError where no C++ compiler answers."""
        from onegraph.torch_compat import toolchain  # imports Inductor, which takes a second

        try:
            toolchain.compiler_version(toolchain.cpp_compiler())
        except toolchain.ToolchainMissingError as error:
            raise no_compiler(error) from error

    def start_build(self, kernels: Sequence[KernelSource]) -> KernelBuild:
        """One library of all kernels; no files for a piece without kernels. Raises CompileError."""
        if foreign := [kernel.function for kernel in kernels if kernel.language != "cpp"]:
            raise CompileError(
                f"the graph makes tensors on another device than its weights and inputs lie on: {foreign[0]}",
                where="building the kernels of a piece",
                hint="give the module a weight or an input on that device, or call it with a tensor of it",
            )
        return self._start(library_source(kernels), "building the kernels of a piece") if kernels else NothingToBuild()

    def kernel_sources(self, files: Mapping[str, Path], names: Mapping[str, str]) -> dict[str, str]:
        """The C++ text, without what other pieces of the same build had put into it."""
        return {SOURCE: only_kernels(files[SOURCE].read_text(), names)} if SOURCE in files else {}

    def build_edited(
        self, files: Mapping[str, Path], names: Mapping[str, str], sources: Mapping[str, Path]
    ) -> dict[str, bytes]:
        """The library of the edited text, whose errors and debug information name the edited file."""
        path = sources[SOURCE]
        text = f"#line 1 {json.dumps(str(path))}\n{path.read_text()}"
        return {LIBRARY: self._start(text, f"building the edited {path}").files()[LIBRARY]}

    def op_kernel_factors(self) -> dict[str, Any]:
        """Source, flags with what torch derives more of them from, and the machine; not the number of threads."""
        return {
            "source": hashlib.sha256(own_ops.library_source().encode()).hexdigest(),
            "flags": list(own_ops.FLAGS),
            "torch": torch.__version__,
            "inductor": cpp_settings(),
            "cpu_flags": cpu_facts.cpu_flags(),
        }

    def start_op_kernels_build(self) -> KernelBuild:
        """The library of `own_ops.py`. Raises CompileError."""
        return self._start(own_ops.library_source(), "building the kernels of onegraph's ops", own_ops.FLAGS)

    def load_op_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Callable[..., Any]]:
        """The ops of `targets/cpu/own_ops.py`."""
        return own_ops.implementations(self.load_kernels(files))

    def _start(self, text: str, where: str, flags: Sequence[str] = ()) -> KernelBuild:
        self.check_toolchain()
        return CompilerRun(text, flags, where)

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
        module.bind(cpu_facts.tensor_data_pointer_function())
        return vars(module)
