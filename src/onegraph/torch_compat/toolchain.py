"""The C++ toolchain as Inductor would use it: which compiler, which flags, which instruction set."""

from __future__ import annotations

import contextlib
import functools
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch._inductor.config
from torch._inductor import cpp_builder, cpu_vec_isa


class ToolchainMissingError(Exception):
    """There is no C++ compiler; the text names what was tried."""


@contextlib.contextmanager
def toolchain_as_declared() -> Iterator[None]:
    """Inside, Inductor believes what CPU and C++ compiler declare of themselves, and runs no test programs.

    Torch would build and load one for each set of instructions, half a second each; `cpp.vec_isa_ok` leaves out only
    those for AVX (torch 2.13). So the compiler is asked whether it knows the flags for VNNI, bf16 and AMX. Nor is
    there a warning that Python.h is missing: our kernels don't include it.
    """

    def knows_flags(isa: cpu_vec_isa.VecISA, code: str) -> bool:
        return accepts(cpp_compiler(), isa.build_arch_flags())

    with (
        torch._inductor.config.patch({"cpp.vec_isa_ok": True}),
        mock.patch.object(cpu_vec_isa.VecISA, "check_build", knows_flags),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Can't find Python.h")
        yield


@functools.cache
def accepts(compiler: str, flags: str) -> bool:
    """Whether a C++ compiler takes the flags, by preprocessing nothing: some 10 ms."""
    command = [compiler, *shlex.split(flags), "-E", "-x", "c++", "/dev/null"]
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def cpp_compiler() -> str:
    """The C++ compiler's command. Raises ToolchainMissingError."""
    try:
        return str(cpp_builder.get_cpp_compiler())
    except Exception as error:
        raise ToolchainMissingError(str(error).splitlines()[0] if str(error) else "no C++ compiler") from error


@functools.cache
def compiler_version(command: str) -> str:
    """The first line of `command --version`."""
    try:
        output = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainMissingError(f"{command} --version failed: {error}") from error
    return output.stdout.splitlines()[0].strip()


def compile_command(sources: list[str], name: str, output_dir: Path) -> tuple[list[str], Path]:
    """The command that builds a shared library of kernels from C++ sources, and the library's path."""
    with toolchain_as_declared():
        options = cpp_builder.CppTorchDeviceOptions(
            vec_isa=cpu_vec_isa.pick_vec_isa(), include_pytorch=False, shared=True, device_type="cpu"
        )
        builder = cpp_builder.CppBuilder(name=name, sources=sources, BuildOption=options, output_dir=str(output_dir))
    return shlex.split(builder.get_command_line()), Path(builder.get_target_file_path())
