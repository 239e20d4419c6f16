"""The command line's exit codes, and errors as one block without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onegraph.cli import main as main_module
from onegraph.cli.main import COMMANDS, main
from onegraph.errors import CompileError, ConfigError


def failing_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setitem(main_module.COMMANDS, "run", (fail, ""))


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("wrong setting", hint="set it right"), 2, "[OG-CONFIG] wrong setting\n  to do: set it right"),
        (CompileError("g++ failed", where="piece 0"), 1, "[OG-COMPILE] g++ failed\n  where: piece 0"),
        (ZeroDivisionError("oops"), 1, "unexpected ZeroDivisionError: oops"),
        (KeyboardInterrupt(), 1, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_are_one_block(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing_with(error, monkeypatch)
    assert main(["run"]) == code
    plain = capsys.readouterr()
    assert told in plain.err
    assert "Traceback" not in plain.err
    assert plain.out == ""
    assert main(["run", "--verbose"]) == code
    verbose = capsys.readouterr().err
    assert told in verbose
    assert "Traceback" in verbose


def test_no_command_shows_the_commands_and_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_an_unknown_command_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["confg"]) == 2
    assert "did you mean 'config'?" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    import onegraph

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"onegraph {onegraph.__version__}\n"


@pytest.mark.parametrize("value", ["", "file", "file/below"])
def test_a_trace_that_cannot_be_written(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_TRACE", value)
    assert main(["config"]) == 2
    assert "[OG-CONFIG]" in (told := capsys.readouterr().err) and "TORCH_TRACE" in told


def test_a_log_that_torch_does_not_know() -> None:
    words = [sys.executable, "-m", "onegraph.cli.main", "run", "--enforce-eager", "--num-kv-blocks", "16"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "TORCH_LOGS": "nope"}, timeout=300)
    assert done.returncode == 2
    assert "[OG-CONFIG]" in done.stderr and "nope" in done.stderr and len(done.stderr.splitlines()) == 3
