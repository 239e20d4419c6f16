"""The protocol of a target: what a device declares about itself, and how its kernels are built and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class KernelSource:
    """A kernel as a compiler wrote it: its name in a library, its C argument types, and its source.

    Kernels of one name are the same.
    """

    name: str
    argtypes: tuple[str, ...]
    source: str


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


class Target(Protocol):
    """A kind of device."""

    name: str
    dispatch_key: str
    """Under which torch's dispatcher finds the device's implementations of ops."""

    def fingerprint(self) -> dict[str, Any]:
        """What of the machine is baked into kernels: ISA, threads. JSON-able, part of every key."""
        ...

    def required_alignment(self, itemsize: int) -> int:
        """The alignment in bytes of an input's data that generated kernels rely on."""
        ...

    def compiler_options(self) -> dict[str, Any]:
        """Inductor options that this target always sets; part of every key."""
        ...

    def check_toolchain(self) -> None:
        """Raises CompileError, with what to install, where kernels can't be built."""
        ...

    def start_build(self, kernels: Sequence[KernelSource]) -> KernelBuild:
        """Begins to compile the kernels, and returns at once. Raises CompileError where there is no toolchain."""
        ...

    def load_kernels(self, files: Mapping[str, Path]) -> Mapping[str, Any]:
        """Loads what `start_build` made; gives a callable for each kernel name."""
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
