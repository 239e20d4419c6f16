"""Kernels of ops as other CPUs would get them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from onegraph.targets.cpu import own_ops
from onegraph.targets.cpu.target import LIBRARY, CpuTarget
from onegraph.torch_compat import toolchain


@pytest.fixture(scope="session")
def kernels_built_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Mapping[str, Callable[..., Any]]]:
    """The ops' implementations as the compiler makes them with some flags after ours; each set is built once."""
    built: dict[tuple[str, ...], Mapping[str, Callable[..., Any]]] = {}

    def build(*flags: str) -> Mapping[str, Callable[..., Any]]:
        if flags not in built:
            folder = tmp_path_factory.mktemp("kernels")
            source = folder / "kernels.cpp"
            source.write_text(own_ops.library_source())
            command, library = toolchain.compile_command([str(source)], "kernels", folder)
            subprocess.run([*command, *own_ops.FLAGS, *flags], check=True, cwd=folder)
            built[flags] = CpuTarget().load_op_kernels({LIBRARY: library})
        return built[flags]

    return build
