"""The stand-in for g++ that the tests share: it gives what the compiler gave, and runs it for whatever is new."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compiler_cache import HEADER, RUNS_WITHOUT, put_before_path

COMPILER = """#!/bin/sh
echo "$*" >> "$0.log"
for word; do
    case $word in *.cpp | *.h) source=$word ;; esac
    [ "$last" = -o ] && library=$word
    last=$word
done
grep -q nonsense "$source" && { echo "no sense" >&2; exit 3; }
cp "$source" "$library"
"""
"""Whose libraries are the sources. It notes how it was called."""

Compile = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    path = tmp_path / "compiler"
    path.write_text(COMPILER)
    path.chmod(0o755)
    return path


@pytest.fixture
def gxx(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compile:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    put_before_path(str(compiler), tmp_path / "cache")

    def run(name: str, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / f"{name}.cpp").write_text(text)
        words = ["g++", str(tmp_path / f"{name}.cpp"), *flags, "-o", str(tmp_path / f"{name}.so")]
        return subprocess.run(words, capture_output=True, text=True)

    return run


def runs_of(compiler: Path) -> list[str]:
    log = compiler.with_name("compiler.log")
    return log.read_text().splitlines() if log.exists() else []


def test_the_same_text_and_flags_are_compiled_once(gxx: Compile, compiler: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert gxx(name, "int x;", "-shared", "-O2").returncode == 0
        assert (tmp_path / f"{name}.so").read_text() == "int x;"
    assert len(runs_of(compiler)) == 1
    gxx("three", "int y;", "-shared", "-O2")
    gxx("four", "int x;", "-shared", "-O3")
    assert len(runs_of(compiler)) == 3 and (tmp_path / "three.so").read_text() == "int y;"


def test_what_fails_fails_each_time_with_the_compilers_words(gxx: Compile, compiler: Path) -> None:
    for runs in (1, 2):
        failed = gxx("one", "nonsense", "-shared")
        assert (failed.returncode, failed.stderr) == (3, "no sense\n") and len(runs_of(compiler)) == runs


def test_a_library_that_there_is_no_room_for_is_left_to_the_compiler(gxx: Compile, compiler: Path) -> None:
    assert gxx("one", "int x;", "-shared").returncode == 0
    words = " ".join(gxx("one", "int x;", "-shared").args)
    limited = subprocess.run(["sh", "-c", f"ulimit -f 0; exec {words}"], capture_output=True, text=True)
    assert limited.returncode != 0


def test_the_header_is_precompiled_once_for_flags_that_are_used_often(
    gxx: Compile, compiler: Path, tmp_path: Path
) -> None:
    header = tmp_path / "include" / HEADER
    header.parent.mkdir(parents=True)
    header.write_text("struct Vector;")
    num_texts = RUNS_WITHOUT + 2
    for number in range(num_texts):
        done = gxx("one", f"#include <{HEADER}>\nint x{number};", "-shared", "-O2", f"-I{tmp_path}/include", "-lm")
        assert done.returncode == 0 and f"x{number}" in (tmp_path / "one.so").read_text()
    runs = runs_of(compiler)
    (precompiling,) = [one for one in runs if "c++-header" in one]
    assert runs.index(precompiling) == RUNS_WITHOUT and len(runs) == num_texts + 1
    assert precompiling.startswith("-O2 ") and "-lm" not in precompiling and "-shared" not in precompiling
    folder = runs[-1].split()[0].removeprefix("-I")
    assert (Path(folder) / f"{HEADER}.gch").read_text() == "struct Vector;"


def test_other_runs_are_the_compilers(gxx: Compile, compiler: Path) -> None:
    for runs in (1, 2):
        assert gxx("one", "int x;", "-c").returncode == 0 and len(runs_of(compiler)) == runs


def test_a_path_without_it_has_no_compiler(gxx: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError):
        gxx("one", "int x;", "-shared")
