"""CUDA as a target: its fingerprint, Inductor's Triton kernels built and loaded, and the kernels of onegraph's ops.

Kernels in C++, which Inductor writes for what a graph does on the CPU beside, are the CPU target's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from onegraph.errors import CompileError
from onegraph.ir.recording import Recorder
from onegraph.ir.target import KernelBuild, KernelSource, NotLoaded
from onegraph.targets.cpu.compiler_run import NothingToBuild
from onegraph.targets.cpu.target import CpuTarget
from onegraph.targets.cuda import attention
from onegraph.targets.cuda.graphs import CudaGraphRecorder
from onegraph.targets.cuda.triton_build import MixedBuild, build_edited_kernels, kernel_texts, load_triton_kernels
from onegraph.torch_compat import inductor, triton_kernels


class CudaTarget:
    """Kernels are cubins for the current device's architecture. Needs Triton, which comes with torch for CUDA."""

    name = "cuda"
    dispatch_key = "CUDA"
    device_types: tuple[str, ...] = ("cpu", "cuda")
    op_kernels_kind = "Triton kernel"
    facts: frozenset[str] = frozenset()
    plans_memory = False

    def __init__(self, *, runs: bool = True) -> None:
        self._cpu = CpuTarget(runs=runs)
        self.runs = runs

    def fingerprint(self) -> dict[str, Any]:
        """The GPU, and the toolkit and Triton that compile for it; the CPU too, since pieces may run on both."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "triton": triton_kernels.version(),
            "cpu": self._cpu.fingerprint(),
        }

    def required_alignment(self, itemsize: int) -> int:
        """Kernels load 16 bytes at once where the traced input lay so."""
        return inductor.ALIGNMENT

    def available_bytes(self) -> int | None:
        """What the driver has free on the current device, and what torch's allocator holds unused."""
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """On the current device, whose memory it takes at once. Raises MemoryError."""
        try:
            return torch.zeros(shape, dtype=dtype, device=self.name)
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryError(str(error).splitlines()[0]) from error

    def compiler_options(self) -> dict[str, Any]:
        """One configuration for each kernel, chosen without timing: so cold and warm starts give the same bits.

        Kernels are built in this process, by `start_build`.
        """
        return {
            **self._cpu.compiler_options(),
            "deterministic": True,
            "triton.autotune_pointwise": False,
            "triton.mix_order_reduction": False,  # torch 2.11 fails on it where a size is unbacked
            "compile_threads": 1,
        }

    def compiling(self) -> AbstractContextManager[None]:
        """Inductor asks the current device, which is the one that it is compiled for."""
        return self._cpu.compiling()

    def check_toolchain(self) -> None:
        """Raises CompileError where Triton can't compile for a GPU here."""
        problem = triton_kernels.problem()
        if problem is not None:
            raise CompileError(
                f"Triton can't be used: {problem}",
                where="building the kernels of a piece",
                hint="pip install triton, and a C compiler (Debian, Ubuntu: apt-get install gcc); "
                "--enforce-eager runs without compiling",
            )

    def start_build(self, kernels: Sequence[KernelSource]) -> KernelBuild:
        """C++ begins at once, beside the caller; Triton's kernels are compiled when the files are asked for."""
        cpp = [kernel for kernel in kernels if kernel.language == "cpp"]
        triton = [kernel for kernel in kernels if kernel.language == "triton"]
        return MixedBuild(self._cpu.start_build(cpp), triton)

    def load_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Any]:
        """Triton's kernels as Inductor's runtime launches them, and C++ functions."""
        if not self.runs:
            return NotLoaded()
        return {**self._cpu.load_kernels(files), **load_triton_kernels(files)}

    def kernel_sources(self, files: Mapping[str, Path], names: Mapping[str, str]) -> dict[str, str]:
        """A Python file for each Triton kernel, called as in the wrapper, and the C++ text."""
        return {**self._cpu.kernel_sources(files, names), **kernel_texts(files, names)}

    def build_edited(
        self, files: Mapping[str, Path], names: Mapping[str, str], sources: Mapping[str, Path]
    ) -> dict[str, bytes]:
        """The library of the C++ text, and Triton's kernels compiled anew."""
        cpp = {name: path for name, path in sources.items() if path.suffix != ".py"}
        built = self._cpu.build_edited(files, names, cpp) if cpp else {}
        return {**built, **build_edited_kernels(files, names, sources)}

    def op_kernel_factors(self) -> dict[str, Any]:
        """The kernels' source: Triton compiles it for the sizes of a model when it first calls them."""
        source = Path(__file__).with_name("kernels.py").read_bytes()
        return {"source": hashlib.sha256(source).hexdigest(), "triton": triton_kernels.version()}

    def start_op_kernels_build(self) -> KernelBuild:
        """There is nothing to build ahead of the first call."""
        self.check_toolchain()
        return NothingToBuild()

    def load_op_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Callable[..., Any]]:
        """The ops of `targets/cuda/attention.py`."""
        return attention.implementations()

    def recorder(self, *, checks_liveness: bool = False) -> Recorder:
        """A recorder of CUDA graphs that share a pool of memory."""
        return CudaGraphRecorder(checks_liveness=checks_liveness)
