"""The CPU as a target: its fingerprint, and its kernels built by g++ and loaded as a Python extension."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from onegraph.errors import CompileError
from onegraph.ir.recording import Recorder
from onegraph.ir.target import KernelBuild, KernelSource, NotLoaded
from onegraph.targets.cpu import memory, own_ops, tape
from onegraph.targets.cpu.compiler_run import LIBRARY, SOURCE, CompilerRun, NothingToBuild, no_compiler
from onegraph.targets.cpu.library import MODULE, library_source, only_kernels
from onegraph.targets.cpu.march import MARCHES, March
from onegraph.torch_compat import cpu_facts
from onegraph.torch_compat.changed_config import cpp_settings


class CpuTarget:
    """Kernels are C++ with OpenMP over the number of threads at compile time.

    They are for the native instruction set, or those of `march`, which may be another CPU's if the target doesn't run.
    """

    name = "cpu"
    dispatch_key = "CPU"
    device_types: tuple[str, ...] = ("cpu",)
    op_kernels_kind = "C++ kernel"
    facts: frozenset[str] = frozenset({"linear_kernels", "rotary_kernel"})
    plans_memory = True

    def __init__(self, march: March | None = None, *, runs: bool = True) -> None:
        self._march = march
        self.runs = runs

    @classmethod
    def like(cls, fingerprint: Mapping[str, Any]) -> CpuTarget:
        """The target whose code a fingerprint describes, where this CPU has what that needs; else the native one."""
        march = MARCHES.get(str(fingerprint.get("march")))
        fits = march is not None and not march.missing(cpu_facts.cpu_flags())
        return cls(march if fits else None)

    def fingerprint(self) -> dict[str, Any]:
        """What the CPU can do, and the number of threads: both are baked into the code. Runs no compiler.

        The compiler isn't part of it: what it made runs as well on a host that has another one, or none.
        """
        march, threads = self._march, torch.get_num_threads()
        if march is not None:
            return {"march": march.name, "isa": march.isa, "cpu_flags": march.cpu_flags, "threads": threads}
        return {
            "isa": torch.backends.cpu.get_cpu_capability(),
            "cpu_flags": cpu_facts.cpu_flags(),
            "threads": threads,
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

    def compiling(self) -> AbstractContextManager[None]:
        """Inductor asks this CPU for its vectors, if it isn't told."""
        if self._march is None:
            return nullcontext()
        from onegraph.torch_compat import toolchain

        return toolchain.compiling_for(self._march.vectors, self._march.compiler_flags)

    def check_toolchain(self) -> None:
        """Raises CompileError where no C++ compiler answers, and for one that doesn't know the instruction set."""
        from onegraph.torch_compat import toolchain  # imports Inductor, which takes a second

        try:
            compiler = toolchain.cpp_compiler()
            toolchain.compiler_version(compiler)
        except toolchain.ToolchainMissingError as error:
            raise no_compiler(error) from error
        if self._march is not None and not toolchain.accepts(compiler, " ".join(self._march.compiler_flags)):
            raise CompileError(
                f"{compiler} doesn't take {' '.join(self._march.compiler_flags)}",
                where=f"compiling for {self._march.name}",
                hint="install a newer g++ (12 knows all), name another CPU, or leave --march out",
            )

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
        return {LIBRARY: self._start(text, f"building the edited {path}", ("-g",)).files()[LIBRARY]}

    def op_kernel_factors(self) -> dict[str, Any]:
        """Source, flags with what torch derives more of them from, and the machine; not the number of threads."""
        march = self._march
        return {
            "source": hashlib.sha256(own_ops.library_source().encode()).hexdigest(),
            "flags": [*own_ops.FLAGS, *(() if march is None else march.compiler_flags)],
            "torch": torch.__version__,
            "inductor": cpp_settings(),
            "cpu_flags": cpu_facts.cpu_flags() if march is None else march.cpu_flags,
        }

    def start_op_kernels_build(self) -> KernelBuild:
        """The library of `own_ops.py`. Raises CompileError."""
        return self._start(own_ops.library_source(), "building the kernels of onegraph's ops", own_ops.FLAGS)

    def load_op_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Callable[..., Any]]:
        """The ops of `targets/cpu/own_ops.py`."""
        return own_ops.implementations(self.load_kernels(files))

    def _start(self, text: str, where: str, flags: Sequence[str] = ()) -> KernelBuild:
        self.check_toolchain()
        with self.compiling():
            return CompilerRun(text, flags, where, () if self._march is None else self._march.compiler_flags)

    def load_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Any]:
        """The library's functions by kernel name; an empty mapping where a piece has no kernels."""
        if LIBRARY not in files:
            return {}
        if not self.runs:
            return NotLoaded()
        # The loader finds PyInit_<last part of the name>; the first part keeps libraries apart in tracebacks.
        loader = importlib.machinery.ExtensionFileLoader(f"onegraph_artifact.{MODULE}", str(files[LIBRARY]))
        spec = importlib.util.spec_from_loader(loader.name, loader, origin=str(files[LIBRARY]))
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        module.bind(cpu_facts.tensor_data_pointer_function(), tape.tape_address())
        return vars(module)

    def recorder(self, *, checks_liveness: bool = False) -> Recorder:
        """A recorder of kernel tapes, whose memory isn't shared: planned memory is. A tape holds what it reads."""
        return tape.TapeRecorder()
