"""`onegraph doctor` names what is broken in one line each, and says what to do."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from onegraph.cli import doctor
from onegraph.cli.main import main
from onegraph.torch_compat import toolchain


def findings(capsys: pytest.CaptureFixture[str], *, healthy: bool) -> dict[str, dict[str, Any]]:
    assert main(["doctor", "--json"]) == (0 if healthy else 1)
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] is healthy
    return {finding["name"]: finding for finding in facts["findings"]}


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests that aren't about the compiler don't run it."""
    checks = [(name, check) for name, check in doctor.CHECKS if name != "compiler"]
    monkeypatch.setattr(doctor, "CHECKS", checks)


def test_all_is_well_here(capsys: pytest.CaptureFixture[str], session_cache_root: Path) -> None:
    found = findings(capsys, healthy=True)
    assert list(found) == [name for name, _ in doctor.CHECKS]
    assert "g++" in found["compiler"]["text"]
    assert str(session_cache_root) in found["cache"]["text"]
    assert found["variables"]["text"] == "ONEGRAPH_CACHE_ROOT"


def test_the_text_has_a_line_for_each_check(capsys: pytest.CaptureFixture[str], quick_compiler: None) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [name for name, _ in doctor.CHECKS]
    assert lines[-1] == "all good"


def test_a_missing_compiler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise toolchain.ToolchainMissingError("no g++")

    monkeypatch.setattr(toolchain, "cpp_compiler", none)
    finding = findings(capsys, healthy=False)["compiler"]
    assert not finding["ok"]
    assert "apt-get install g++" in finding["text"]
    assert "--enforce-eager" in finding["text"]


def test_a_path_without_a_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = findings(capsys, healthy=False)["compiler"]
    assert not finding["ok"]
    assert "apt-get install g++" in finding["text"]
    assert "\n" not in finding["text"]


def test_a_compiler_that_answers_but_cannot_build(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "g++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo "g++ 99"; exit 0; }\necho "error: no cc1plus" >&2; exit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setattr(toolchain, "cpp_compiler", lambda: str(broken))
    monkeypatch.setattr(toolchain, "compile_command", lambda *_: ([str(broken)], tmp_path / "none.so"))
    finding = findings(capsys, healthy=False)["compiler"]
    assert not finding["ok"]
    assert "no cc1plus" in finding["text"]
    assert "\n" not in finding["text"]


def test_a_wrong_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick_compiler: None
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.0" if name == "torch" else version(name))
    finding = findings(capsys, healthy=False)["torch"]
    assert "2.8.0" in finding["text"]
    assert ">=2.11,<2.14" in finding["text"]


def test_a_cache_root_that_cannot_be_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_compiler: None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(tmp_path / "file/cache"))
    finding = findings(capsys, healthy=False)["cache"]
    assert str(tmp_path / "file/cache") in finding["text"]
    assert "ONEGRAPH_CACHE_ROOT" in finding["text"]


def test_a_cache_root_that_others_can_write(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_compiler: None
) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(tmp_path))
    assert "chmod 700" in findings(capsys, healthy=False)["cache"]["text"]


def test_an_unknown_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick_compiler: None
) -> None:
    monkeypatch.setenv("ONEGRAPH_LOG_LEVL", "INFO")
    assert "did you mean 'ONEGRAPH_LOG_LEVEL'" in findings(capsys, healthy=False)["variables"]["text"]
