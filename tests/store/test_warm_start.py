"""A second process finds what the first one compiled: with the same key, and without a compiler."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onegraph.store.files import put
from onegraph.store.manifest import FileRecord, Manifest

PROGRAM = """
import json, sys, torch
import onegraph
from onegraph.counters import counters
from torch import nn
from torch.export import Dim

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
compiled = onegraph.compile(
    module, dynamic_shapes={"input": {0: Dim("num_tokens", min=1, max=32)}}, config=json.loads(sys.argv[1])
)
errors = []
with torch.no_grad():
    for size in (5, 1, 32):
        x = torch.randn(size, 8)
        errors.append((compiled(x) - module(x)).abs().max().item())
facts = compiled.explain().to_dict()["pieces"][0]["ranges"][0]
print(json.dumps({"counters": counters.snapshot(), "error": max(errors), **facts}))
"""


def start(root: Path, config: Any = None, **variables: str) -> dict[str, Any]:
    """Runs the program in a process of its own; gives what it says about its only piece."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")}
    environment.update({"ONEGRAPH_CACHE_ROOT": str(root), **variables})
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(config or {})],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert facts["error"] < 1e-5
    facts["stderr"] = result.stderr
    return facts


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("store") / "root"
    return root, start(root)


def without_toolchain(tmp_path: Path) -> dict[str, str]:
    """A PATH whose C++ compilers answer --version and fail at anything else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("g++", "c++", "clang++", "gcc", "cc"):
        real = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        if real:
            script = folder / name
            script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\nexit 97\n')
            script.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_first_start_compiles_and_writes(cold: tuple[Path, dict[str, Any]]) -> None:
    _, facts = cold
    assert facts["store"] == "miss" and facts["why"] == "no artifact has this key"
    assert facts["counters"]["inductor_compiles"] == 1
    assert facts["counters"]["gxx_runs"] == 2, "the piece's kernels, and those of onegraph's ops"


def test_a_second_start_compiles_nothing(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, first = cold
    facts = start(root, **without_toolchain(tmp_path))
    assert facts["store"] == "hit" and facts["key"] == first["key"]
    for name in ("inductor_compiles", "gxx_runs", "aot_compiles", "dynamo_compiles", "store_writes"):
        assert facts["counters"].get(name, 0) == 0, name


def test_nothing_outside_the_root_is_needed(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = cold
    moved = tmp_path / "elsewhere"
    subprocess.run(["cp", "-a", str(root), str(moved)], check=True)
    facts = start(moved, TMPDIR=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "none"))
    assert facts["store"] == "hit"


def test_what_reaches_the_compiler_changes_the_key(cold: tuple[Path, dict[str, Any]]) -> None:
    root, first = cold
    other = start(root, {"inductor_compile_config": {"size_asserts": False}})
    threads = start(root, OMP_NUM_THREADS="1")
    assert other["store"] == threads["store"] == "miss"
    assert len({first["key"], other["key"], threads["key"]}) == 3


def test_what_doesnt_reach_the_compiler_keeps_the_key(cold: tuple[Path, dict[str, Any]]) -> None:
    root, first = cold
    facts = start(root, {"mode": "DYNAMO_TRACE_ONCE"}, ONEGRAPH_LOG_LEVEL="DEBUG")
    assert facts["key"] == first["key"] and facts["store"] == "hit"


def test_disabled_reads_and_writes_nothing(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = cold
    before = sorted(root.rglob("*"))
    facts = start(root, ONEGRAPH_DISABLE_COMPILE_CACHE="1")
    assert facts["store"] == "off" and facts["why"] == "the compile cache is off"
    assert facts["counters"]["inductor_compiles"] == 1
    assert sorted(root.rglob("*")) == before


def manifest_of(root: Path, key: str) -> Path:
    return root / "entries" / key[:2] / key / "manifest.json"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_entry_is_quarantined_and_compiled_again(
    cold: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", str(cold[0]), str(root)], check=True)
    manifest = manifest_of(root, cold[1]["key"])
    library = json.loads(manifest.read_text())["files"]["kernels.so"]["sha256"]
    victim = root / "blobs" / library[:2] / library
    contents = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(contents[:-9] + bytes([contents[-9] ^ 1]) + contents[-8:])
    elif damage == "truncate":
        victim.write_bytes(contents[: len(contents) // 2])
    elif damage == "delete":
        victim.unlink()
    else:
        manifest.write_text(manifest.read_text()[:-40])
    facts = start(root)
    assert facts["store"] == "miss" and facts["counters"]["store_quarantined"] == 1
    assert len([line for line in facts["stderr"].splitlines() if "quarantine" in line]) == 1
    assert start(root)["store"] == "hit"


def test_an_edited_byte_of_a_dead_process_is_never_seen(tmp_path: Path) -> None:
    """A file that a killed writer left behind doesn't count as a blob or an entry."""
    root = tmp_path / "root"
    facts = start(root)
    for blob in [p for p in (root / "blobs").rglob("*") if p.is_file()]:
        blob.with_name(".writing-dead").write_bytes(b"half")
    assert start(root)["key"] == facts["key"]


@pytest.mark.usefixtures("real_compiler")
def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")}
    environment["ONEGRAPH_CACHE_ROOT"] = str(root)
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, "{}"], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    facts = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert sum(f["counters"].get("inductor_compiles", 0) for f in facts) == 1
    assert sorted(f["store"] for f in facts) == ["hit", "hit", "miss"]


def test_an_artifact_that_cant_be_loaded_is_compiled_again(cold: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Right checksums don't make a library loadable: here its contents are another file, consistently recorded."""
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", str(cold[0]), str(root)], check=True)
    manifest = manifest_of(root, cold[1]["key"])
    facts = Manifest.from_json(manifest.read_text())
    contents = b"not a library"
    record = FileRecord(hashlib.sha256(contents).hexdigest(), len(contents))
    put(root / "blobs" / record.sha256[:2] / record.sha256, contents)
    manifest.write_text(replace(facts, files={**facts.files, "kernels.so": record}).to_json())
    again = start(root)
    assert again["store"] == "miss" and "can't be loaded" in again["stderr"]
