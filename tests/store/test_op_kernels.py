"""The kernels of onegraph's ops in the store: built once, verified, and replaced by plain PyTorch if need be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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

INSTALL = """
import resource, sys
from onegraph.api import open_store
from onegraph.op_kernels import install_op_kernels, op_kernels_begun
from onegraph.targets import target_for

target, store = target_for("cpu"), open_store()
with op_kernels_begun(target, store):
    print("begun", flush=True)
    if sys.argv[1:]:  # from now on no file takes more than these bytes, as on a disk that has become full
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    found = install_op_kernels(target, store)
print(found.is_installed, found.store, found.why)
"""


def environment_with(root: Path, **variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")}
    return {**kept, "ONEGRAPH_CACHE_ROOT": str(root), **variables}


def start(root: Path, file_kilobytes: int | None = None, **variables: str) -> dict[str, Any]:
    """Runs the program in a process of its own, in which no file takes more than `file_kilobytes`."""
    limit = "" if file_kilobytes is None else f"ulimit -f {file_kilobytes}; "
    result = subprocess.run(
        ["bash", "-c", f'{limit}exec "$@"', "bash", sys.executable, "-c", PROGRAM],
        env=environment_with(root, **variables),
        capture_output=True,
        text=True,
    )
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
    assert "C++ kernel, built" in facts["attention"] and not any("plain PyTorch" in note for note in facts["notes"])


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
    (note,) = [note for note in facts["notes"] if "plain PyTorch" in note]
    assert "no working C++ compiler" in note and note in facts["summary"]
    assert len([line for line in facts["stderr"].splitlines() if "no working C++ compiler" in line]) == 1


def test_with_the_cache_off_it_is_built_and_not_kept(tmp_path: Path) -> None:
    facts = start(tmp_path / "root", ONEGRAPH_DISABLE_COMPILE_CACHE="1")
    assert facts["counters"]["gxx_runs"] == 1 and "the compile cache is off" in facts["attention"]
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("kilobytes", [4, 100], ids=["no room for the source", "no room for the library"])
def test_on_a_full_disk_the_reference_runs_and_says_why(
    cold: tuple[Path, dict[str, Any]], tmp_path: Path, kilobytes: int
) -> None:
    facts = start(tmp_path / "root", file_kilobytes=kilobytes)
    assert facts["text"] == cold[1]["text"] and facts["attention"].split(maxsplit=1)[1] == "plain PyTorch"
    (note,) = [note for note in facts["notes"] if "plain PyTorch" in note]
    assert ("File too large" if kilobytes == 4 else "File size limit") in note


def test_a_disk_that_became_full_while_it_was_built_is_told(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", INSTALL, "4096"], env=environment_with(tmp_path / "root"), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "False off" in result.stdout and "what was built can't be written" in result.stdout
    assert "couldn't be kept in" in result.stderr and not list((tmp_path / "root").rglob("*.so"))


@pytest.mark.usefixtures("real_compiler")
def test_a_start_that_is_killed_costs_the_next_one_nothing_but_its_own_build(tmp_path: Path) -> None:
    """Killed at different moments of one cold start, with the compiler left running or the store half written."""
    root = tmp_path / "root"
    for seconds in (0.0, 1.0, 3.5):
        victim = subprocess.Popen(
            [sys.executable, "-c", INSTALL], env=environment_with(root), stdout=subprocess.PIPE, text=True
        )
        assert victim.stdout is not None and victim.stdout.readline() == "begun\n"
        time.sleep(seconds)
        victim.kill()
        victim.communicate()
    for wanted in ("True miss", "True hit"):
        done = subprocess.run(
            [sys.executable, "-c", INSTALL], env=environment_with(root), capture_output=True, text=True
        )
        assert wanted in done.stdout or "True hit" in done.stdout, "the last victim may have finished"
        assert not done.stderr and not (root / "quarantine").exists()
