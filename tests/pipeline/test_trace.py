"""TORCH_TRACE and TORCH_LOGS work with onegraph as they do with torch, on a cold and on a warm start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "onegraph.cli.main", "run", "--prompt", "def ", "--max-tokens", "2"]


def run(folder: Path, **variables: str) -> str:
    environment = {**os.environ, "ONEGRAPH_CACHE_ROOT": str(folder / "cache"), "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a cold start and then a warm one were traced."""
    folder = tmp_path_factory.mktemp("trace")
    (folder / "cold.txt").write_text(run(folder, TORCH_TRACE=str(folder / "cold"), TORCH_LOGS="output_code"))
    (folder / "warm.txt").write_text(run(folder, TORCH_TRACE=str(folder / "warm")))
    return folder


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_one_log_that_tlparse_renders_with_our_entries(folder: Path, start: str) -> None:
    (log,) = (folder / start).iterdir()
    report = folder / f"{start}-report"
    tlparse = str(Path(sys.executable).parent / "tlparse")
    rendered = subprocess.run([tlparse, str(log), "-o", str(report), "--no-browser"], capture_output=True, text=True)
    assert rendered.returncode == 0, rendered.stderr
    names = " ".join(path.name for path in report.rglob("*"))
    for entry in ("config", "captured_graph", "ledger", "piece_0_output_code", "explain"):
        assert f"onegraph_{entry}" in names, names
    (code,) = report.rglob("onegraph_piece_0_output_code*")
    assert "= kernels['kernel_" in code.read_text()
    assert f"start     {start}" in (folder / f"{start}.txt").read_text()


def test_torch_logs_prints_the_output_code(folder: Path) -> None:
    assert "async_compile.cpp_pybinding" in (folder / "cold.txt").read_text()
