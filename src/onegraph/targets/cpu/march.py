"""Instruction sets that `--march` names: what the compiler is told, and which CPUs run what it makes.

Code for one of them runs on every x86-64 CPU that has its flags, whichever it was compiled on. The flags are those of
`/proc/cpuinfo`.

Source: x86-64 psABI, levels v3 and v4; GCC manual, x86 options.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass

from onegraph.errors import ConfigError, nearest

NATIVE = "native"

_V3 = (
    "abm avx avx2 bmi1 bmi2 cx16 cx8 cmov f16c fma fpu fxsr lahf_lm mmx movbe pni popcnt sse sse2 sse4_1 sse4_2 ssse3 "
    "xsave"
)
_V4 = f"{_V3} avx512bw avx512cd avx512dq avx512f avx512vl"


@dataclass(frozen=True)
class March:
    """`isa` is torch's name for its vectors, `vectors` Inductor's; `cpu_flags` are sorted and joined by spaces."""

    name: str
    isa: str
    vectors: str
    compiler_flags: tuple[str, ...]
    cpu_flags: str

    def missing(self, cpu_flags: str) -> list[str]:
        """Of the flags that its code needs, those that a CPU hasn't."""
        return sorted(set(self.cpu_flags.split()) - set(cpu_flags.split()))


def _march(name: str, isa: str, compiler_flags: Iterable[str], cpu_flags: str) -> March:
    return March(name, isa, name, tuple(compiler_flags), " ".join(sorted(cpu_flags.split())))


MARCHES = {
    one.name: one
    for one in (
        _march("avx2", "AVX2", ["-march=x86-64-v3"], _V3),
        _march("avx512", "AVX512", ["-march=x86-64-v4"], _V4),
        _march(
            "amx",
            "AVX512",
            ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
            f"{_V4} amx_bf16 amx_int8 amx_tile avx512_bf16 avx512_vnni",
        ),
    )
}


NAMES = (NATIVE, *MARCHES)


def march_named(name: str | None) -> March | None:
    """None for `native` and None. Raises ConfigError for an unknown name, and on a CPU of another kind."""
    if name is None or name == NATIVE:
        return None
    if name not in MARCHES:
        raise ConfigError(
            f"march={name!r}: it is one of {', '.join(NAMES)}", where="--march", hint=nearest(str(name), NAMES)
        )
    if platform.machine() not in ("x86_64", "AMD64"):
        raise ConfigError(
            f"march={name!r} is of x86-64, and this machine is {platform.machine()}",
            where="--march",
            hint="compile on an x86-64 machine: code of one family of CPUs isn't compiled on another here",
        )
    return MARCHES[name]
