"""A run of the C++ compiler beside its caller: its files, its errors, and its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from onegraph.errors import CompileError
from onegraph.targets.cpu.compiler_run import CompilerRun, NothingToBuild

pytestmark = pytest.mark.usefixtures("real_compiler")


def test_files_are_the_source_and_a_library() -> None:
    text = 'extern "C" int answer() { return 42; }\n'
    files = CompilerRun(text, (), "building a test").files()
    assert files["kernels.cpp"].decode() == text
    assert files["kernels.so"].startswith(b"\x7fELF")
    assert NothingToBuild().files() == {}


def test_two_run_at_once_and_give_their_own() -> None:
    runs = [CompilerRun(f'extern "C" int answer_{i}() {{ return {i}; }}\n', (), "building a test") for i in range(2)]
    libraries = [run.files()["kernels.so"] for run in runs]
    assert b"answer_0" in libraries[0] and b"answer_1" in libraries[1] and b"answer_0" not in libraries[1]


def test_what_it_says_of_an_error_is_told() -> None:
    run = CompilerRun("int broken( { nonsense;\n", (), "building a test")
    with pytest.raises(CompileError, match=r"failed with exit code 1: .*error") as raised:
        run.files()
    assert raised.value.where == "building a test"
    assert not Path(run._folder.name).exists()


def test_a_cancelled_one_is_gone_with_what_it_was_given() -> None:
    endless = "template <int N> struct Deep { static const long value = Deep<N - 1>::value + Deep<N - 2>::value; };\n"
    run = CompilerRun(f"{endless}int main() {{ return Deep<800>::value; }}\n", ("-ftemplate-depth=900",), "a test")
    run.cancel()
    assert run._process.poll() is not None
    assert not Path(run._folder.name).exists()
    run.cancel()


def test_a_folder_that_takes_no_files_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CompileError, match=r"the sources can't be written: .*nowhere(.|\n)*make room in"):
        CompilerRun("int x;", (), "a test")
