"""The protocol of a target: what a device declares about itself, and how its kernels are built and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onegraph.ir.recording import Recorder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KernelSource:
    """A kernel as a compiler wrote it: its name in a library, its C argument types, and its source.

    Kernels of one name are the same. `language` is `cpp` or `triton`; `function` is the kernel's name in its own
    source.
    """

    name: str
    argtypes: tuple[str, ...]
    source: str
    language: str = "cpp"
    function: str = "kernel"


class KernelBuild(Protocol):
    """A build that runs beside the caller, in processes of its own."""

    def files(self) -> dict[str, bytes]:
        """Waits for its end; gives the files that an artifact keeps, `{name: contents}`.

        Raises CompileError with the toolchain's own words.
        """
        ...

    def cancel(self) -> None:
        """Ends it, if it still runs."""
        ...


class NotLoaded(dict[str, Any]):
    """Kernels by name that are for another process: each can be bound, and none called."""

    def __missing__(self, name: str) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"the kernel {name} was called where it was only compiled")

        return kernel


class Target(Protocol):
    """A kind of device."""

    name: str
    dispatch_key: str
    """Under which torch's dispatcher finds the device's implementations of ops."""
    device_types: tuple[str, ...]
    """The devices whose kernels may stand in one piece of this target's."""
    op_kernels_kind: str
    """What the kernels of onegraph's own ops are, in words."""
    facts: frozenset[str]
    """What passes may rely on, by name, such as `linear_kernels`."""
    plans_memory: bool
    """Whether intermediate values can have places in a block of memory that calls share, instead of an allocator's."""
    runs: bool
    """Whether code is loaded and run in this process; else it is made for a later one, maybe on another machine, and
    whatever needs code that runs, or the values of weights, is left to that one."""

    def fingerprint(self) -> dict[str, Any]:
        """What of the machine is baked into kernels: ISA, threads. JSON-able, part of every key."""
        ...

    def required_alignment(self, itemsize: int) -> int:
        """The alignment in bytes of an input's data that generated kernels rely on."""
        ...

    def available_bytes(self) -> int | None:
        """Memory of the device that this process can still take; None where that can't be known."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros with a storage of its own. Raises MemoryError, with the device's words."""
        ...

    def compiler_options(self) -> dict[str, Any]:
        """Inductor options that this target always sets; part of every key."""
        ...

    def compiling(self) -> AbstractContextManager[None]:
        """Inside, Inductor writes kernels for this target's machine, if that is another one than this."""
        ...

    def check_toolchain(self) -> None:
        """Raises CompileError, with what to install, where kernels can't be built."""
        ...

    def start_build(self, kernels: Sequence[KernelSource]) -> KernelBuild:
        """Begins to compile the kernels, and returns at once. Raises CompileError where there is no toolchain."""
        ...

    def load_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Any]:
        """Loads what `start_build` made; gives a callable for each kernel name, or `NotLoaded` if it doesn't run."""
        ...

    def kernel_sources(self, files: Mapping[str, Path], names: Mapping[str, str]) -> dict[str, str]:
        """The texts of an artifact's kernels as people edit them, by file name. Nothing else reads them.

        `names` maps the kernels that the artifact calls to their names in its wrapper.
        """
        ...

    def build_edited(
        self, files: Mapping[str, Path], names: Mapping[str, str], sources: Mapping[str, Path]
    ) -> dict[str, bytes]:
        """What takes the place of files of an artifact, made of its texts of `kernel_sources` after an edit.

        Raises CompileError in the toolchain's words, which name the file and the line.
        """
        ...

    def op_kernel_factors(self) -> dict[str, Any]:
        """What the library of kernels for onegraph's own ops is made of. JSON-able: its key. Runs no compiler."""
        ...

    def start_op_kernels_build(self) -> KernelBuild:
        """Begins to compile that library, and returns at once. Raises CompileError where there is no toolchain."""
        ...

    def load_op_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Callable[..., Any]]:
        """Loads what `start_op_kernels_build` made; gives an implementation for each op by name."""
        ...

    def recorder(self, *, checks_liveness: bool = False) -> Recorder:
        """What makes recordings of one compiled model. Only for a target that runs.

        With `checks_liveness` replays look whether all memory is still there, where the device can tell.
        """
        ...
