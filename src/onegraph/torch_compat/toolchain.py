"""The C++ toolchain as Inductor would use it: which compiler, which flags, which instruction set."""

from __future__ import annotations

import contextlib
import functools
import shlex
import subprocess
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch._inductor.config
from torch._inductor import cpp_builder, cpu_vec_isa

_VECTORS: Mapping[str, tuple[type[cpu_vec_isa.VecISA], ...]] = {
    "avx2": (cpu_vec_isa.VecAVX2,),
    "avx512": (cpu_vec_isa.VecAVX512, cpu_vec_isa.VecAVX2),
    "amx": (cpu_vec_isa.VecAMX, cpu_vec_isa.VecAVX2),
}
"""By name, the widest first; `cpp.simdlen` chooses another."""


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


@contextlib.contextmanager
def compiling_for(vectors: str, flags: Sequence[str]) -> Iterator[None]:
    """Inside, Inductor writes kernels for a CPU with these vectors, compiled with these flags: it doesn't ask this one.

    It would take scalars for vectors that this CPU hasn't, and add flags for what it has. The tests of `__bool__` and
    the flags of its own vectors are of this CPU (torch 2.13).
    """
    given = " ".join(flags)

    def declared(base: type[cpu_vec_isa.VecISA]) -> cpu_vec_isa.VecISA:
        members = {
            "__bool__": lambda self: True,
            "build_arch_flags": lambda self: given,
            "_is_avx512_bf16_supported": "-mavx512bf16" in flags,
        }
        made: cpu_vec_isa.VecISA = type(base.__name__, (base,), members)()
        return made

    known = [declared(base) for base in _VECTORS[vectors]]

    def pick() -> cpu_vec_isa.VecISA:
        asked = torch._inductor.config.cpp.simdlen
        return next((isa for isa in known if asked in (None, isa.bit_width())), cpu_vec_isa.invalid_vec_isa)

    with mock.patch.object(cpu_vec_isa, "pick_vec_isa", pick):
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


def compile_command(
    sources: list[str], name: str, output_dir: Path, machine_flags: Sequence[str] = ()
) -> tuple[list[str], Path]:
    """The command that builds a shared library of kernels from C++ sources, and the library's path.

    `machine_flags`, if there are any, stand for those of this CPU; then it must be called inside `compiling_for`.
    """
    with toolchain_as_declared():
        options = cpp_builder.CppTorchDeviceOptions(
            vec_isa=cpu_vec_isa.pick_vec_isa(), include_pytorch=False, shared=True, device_type="cpu"
        )
        builder = cpp_builder.CppBuilder(name=name, sources=sources, BuildOption=options, output_dir=str(output_dir))
    words = shlex.split(builder.get_command_line())
    if machine_flags:
        own = [word for word in words if not word.startswith(("-march=", "-mtune=", "-mcpu="))]
        words = [own[0], *machine_flags, *own[1:]]
    return words, Path(builder.get_target_file_path())
