"""A library of kernels is built without Python's headers, loads, and checks what it is called with."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from onegraph.ir.target import KernelSource
from onegraph.targets.cpu.library import library_source
from onegraph.targets.cpu.target import LIBRARY, CpuTarget
from onegraph.torch_compat import toolchain

FILL = KernelSource(
    name="fill",
    argtypes=("float*", "const double", "const int64_t", "const bool"),
    source="""
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(float* out_ptr0, const double value, const int64_t ks0, const bool negate)
{
    for (int64_t x0 = 0; x0 < ks0; x0++) out_ptr0[x0] = negate ? -value : value;
}
""",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "kernels.cpp"
    source.write_text(library_source([FILL]))
    command, library = toolchain.compile_command([str(source)], "kernels", folder)
    without_headers = [word for word in command if not re.fullmatch(r"-I.*/include/python3\.\d+", word)]
    subprocess.run(without_headers, check=True, cwd=folder)
    return CpuTarget().load_kernels({LIBRARY: library})


def test_arguments_reach_the_kernel(kernels: Mapping[str, Any]) -> None:
    out = torch.zeros(4)
    before = sys.getrefcount(None)
    for _ in range(1000):
        assert kernels["fill"](out, 2.5, 3, True) is None
    assert out.tolist() == [-2.5, -2.5, -2.5, 0.0]
    assert sys.getrefcount(None) >= before - 100  # each returned None is a reference of its own


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((1.0, 2, True), "takes 4 arguments, got 3"),
        ((None, "x", 2, True), "must be real number"),
        ((None, 1.0, "x", True), "integer"),
    ],
)
def test_wrong_arguments_raise(kernels: Mapping[str, Any], arguments: tuple[Any, ...], error: str) -> None:
    given = tuple(torch.zeros(2) if value is None else value for value in arguments)
    with pytest.raises((TypeError, RuntimeError), match=error):
        kernels["fill"](*given)
