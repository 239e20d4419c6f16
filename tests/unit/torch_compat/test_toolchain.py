"""What torch takes for the CPU's vector instructions without test programs is what it finds with them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onegraph.torch_compat import toolchain

PROGRAM = """
import json, subprocess, sys
from torch._inductor import cpu_vec_isa
from onegraph.torch_compat import toolchain
run, builds = subprocess.Popen.__init__, []
def counted(self, args, *more, **settings):
    builds.append("-shared" in args)
    run(self, args, *more, **settings)
subprocess.Popen.__init__ = counted
def isa():
    found = cpu_vec_isa.pick_vec_isa()
    return [str(found), found.build_arch_flags(), found.bit_width()]
if sys.argv[1] == "declared":
    with toolchain.toolchain_as_declared():
        print(json.dumps([isa(), sum(builds)]))
else:
    print(json.dumps([isa(), sum(builds)]))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_same_instructions_are_found_without_test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def found(how: str) -> tuple[list[str], int]:
        isa, builds = json.loads(subprocess.check_output([sys.executable, "-c", PROGRAM, how], text=True))
        return isa, builds

    declared, builds = found("declared")
    assert builds == 0
    assert declared == found("probed")[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_flags_that_a_compiler_does_not_know_are_told() -> None:
    assert toolchain.accepts("g++", "-O2")
    assert not toolchain.accepts("g++", "-mno-such-instructions")
    assert not toolchain.accepts("no-such-compiler", "-O2")
