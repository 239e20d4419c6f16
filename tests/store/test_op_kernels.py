"""The attention kernel in the store: built once, verified, and replaced by the reference where it can't be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json
from onegraph import LLM, SamplingParams
from onegraph.counters import counters

llm = LLM(enforce_eager=True, dtype="float32", num_kv_blocks=64)
(output,) = llm.generate("def ", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
lines = {line.split()[0]: line for line in llm.summary().splitlines()}
facts = {"counters": counters.snapshot(), "attention": lines["attention"], "notes": llm.explain().notes}
print(json.dumps({**facts, "summary": llm.summary(), "text": output.outputs[0].text}))
"""


def start(root: Path, **variables: str) -> dict[str, Any]:
    """Runs the program in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")}
    environment.update({"ONEGRAPH_CACHE_ROOT": str(root), **variables})
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    facts["stderr"] = result.stderr
    return facts


def compilers_that_fail(tmp_path: Path) -> str:
    """A PATH on which every C++ compiler ends with an error, whatever it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("g++", "c++", "clang++", "gcc", "cc"):
        (folder / name).write_text("#!/bin/sh\nexit 97\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("store") / "root"
    return root, start(root)


def test_the_first_process_builds_it(cold: tuple[Path, dict[str, Any]]) -> None:
    _, facts = cold
    assert facts["counters"]["gxx_runs"] == facts["counters"]["store_writes"] == 1
    assert "C++ kernel, built" in facts["attention"] and not any("attention" in note for note in facts["notes"])


def test_a_second_process_needs_no_compiler(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, first = cold
    facts = start(root, PATH=compilers_that_fail(tmp_path), OMP_NUM_THREADS="1")
    assert facts["counters"].get("gxx_runs", 0) == facts["counters"].get("op_kernels_missing", 0) == 0
    assert "C++ kernel, loaded" in facts["attention"] and facts["text"] == first["text"]


def test_a_corrupt_library_is_quarantined_and_built_again(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", str(cold[0]), str(root)], check=True)
    (manifest,) = (root / "entries").rglob("manifest.json")
    library = json.loads(manifest.read_text())["files"]["kernels.so"]["sha256"]
    victim = root / "blobs" / library[:2] / library
    contents = victim.read_bytes()
    victim.write_bytes(contents[:-9] + bytes([contents[-9] ^ 1]) + contents[-8:])
    facts = start(root)
    assert facts["counters"]["store_quarantined"] == facts["counters"]["gxx_runs"] == 1
    assert "C++ kernel, built" in facts["attention"] and "quarantine" in facts["stderr"]


def test_without_a_compiler_the_reference_runs_and_says_why(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    facts = start(tmp_path / "root", PATH=compilers_that_fail(tmp_path))
    assert facts["counters"]["op_kernels_missing"] == 1 and facts["text"] == cold[1]["text"]
    assert facts["attention"].split(maxsplit=1)[1] == "plain PyTorch"
    (note,) = [note for note in facts["notes"] if "attention" in note]
    assert "no working C++ compiler" in note and note in facts["summary"]
    assert len([line for line in facts["stderr"].splitlines() if "no working C++ compiler" in line]) == 1


def test_with_the_cache_off_it_is_built_and_not_kept(tmp_path: Path) -> None:
    facts = start(tmp_path / "root", ONEGRAPH_DISABLE_COMPILE_CACHE="1")
    assert facts["counters"]["gxx_runs"] == 1 and "the compile cache is off" in facts["attention"]
    assert not (tmp_path / "root").exists()
