"""What `--march` names: flags that the compiler knows, and exactly the CPU flags that its code needs."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch

from onegraph.errors import ConfigError
from onegraph.targets import MARCHES, target_for, target_like, target_to_compile_for
from onegraph.targets.cpu import march, target
from onegraph.torch_compat import toolchain

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the CPUs that are named are x86-64")
NAMED = march.MARCHES.values()
NOT_THE_SAME = {
    "ABM": "LZCNT",
    "BMI1": "BMI",
    "CX16": "GCC_HAVE_SYNC_COMPARE_AND_SWAP_16",
    "PNI": "SSE3",
    "LAHF_LM": "LAHF_SAHF",
}
"""Flags of /proc/cpuinfo that GCC has another name for."""
OF_EVERY_CPU = {"CMOV", "CX8", "FPU"}


@pytest.mark.parametrize("one", NAMED, ids=lambda one: one.name)
def test_its_cpu_flags_are_what_the_compiler_may_use(one: march.March) -> None:
    command = [toolchain.cpp_compiler(), "-dM", "-E", "-x", "c++", "/dev/null"]

    def macros(*flags: str) -> set[str]:
        text = subprocess.run([*command, *flags], capture_output=True, text=True, check=True).stdout
        return {line.split()[1].strip("_") for line in text.splitlines() if line.endswith(" 1")}

    may = macros(*one.compiler_flags)
    needs = {
        NOT_THE_SAME.get(flag.upper(), flag.upper().replace("AVX512_", "AVX512")) for flag in one.cpu_flags.split()
    } - OF_EVERY_CPU
    assert needs <= may, needs - may
    instructions = {name for name in macros("-march=sapphirerapids") if name.startswith(("AVX", "AMX", "SSE", "BMI"))}
    more = (may & instructions) - needs
    assert {name for name in more if not name.endswith("MATH")} == set()


def test_the_compiler_is_told_of_that_cpu_alone(tmp_path: Path) -> None:
    one = march.MARCHES["avx512"]
    with toolchain.compiling_for(one.vectors, one.compiler_flags):
        words, _ = toolchain.compile_command(["k.cpp"], "k", tmp_path, one.compiler_flags)
    assert "-march=native" not in words and "-march=x86-64-v4" in words
    assert "CPU_CAPABILITY_AVX512" in " ".join(words) and "-mavx512bf16" not in words


def test_a_fingerprint_says_which_cpu_and_a_target_is_like_it_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    one = target_to_compile_for("cpu", "avx512")
    facts = one.fingerprint()
    assert (facts["march"], facts["isa"], facts["threads"]) == ("avx512", "AVX512", torch.get_num_threads())
    monkeypatch.setattr(target.cpu_facts, "cpu_flags", lambda: march.MARCHES["avx2"].cpu_flags)
    assert target_like("cpu", facts).fingerprint() == target_for("cpu").fingerprint()
    monkeypatch.setattr(target.cpu_facts, "cpu_flags", lambda: march.MARCHES["amx"].cpu_flags)
    here = target_like("cpu", facts)
    assert here.fingerprint() == facts and here.runs and not one.runs
    assert here.op_kernel_factors() == one.op_kernel_factors() != target_for("cpu").op_kernel_factors()


def test_what_cant_be_compiled_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MARCHES == ("native", "avx2", "avx512", "amx")
    assert "march" not in target_to_compile_for("cpu", "native").fingerprint()
    with pytest.raises(ConfigError, match="it is one of native, avx2, avx512, amx"):
        target_to_compile_for("cpu", "avx3")
    with pytest.raises(ConfigError, match="of a CPU"):
        target_to_compile_for("cuda", "avx2")
    monkeypatch.setattr(march.platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match="this machine is aarch64"):
        target_to_compile_for("cpu", "avx2")
