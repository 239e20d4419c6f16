"""The command line's exit codes, and errors as one block without a traceback."""

from __future__ import annotations

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
