"""`onegraph trace`: what it runs, whose the terminal and the signals are, what it prints, and when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onegraph.cli.main import main
from tests.debug.written_trace import entries, write_trace
from tests.store.terminal import terminal

COMMAND = """
import os, shutil, signal, sys, time
[shutil.copy(path, os.environ["TORCH_TRACE"]) for path in sys.argv[2:] if os.path.exists(path)]
noted = []
signal.signal(signal.SIGINT, lambda *_: noted.append("SIGINT"))
signal.signal(signal.SIGTERM, lambda *_: noted.append("SIGTERM"))
print("its own output", sys.argv[2:], flush=True)
until = time.monotonic() + 30
while sys.argv[1] in ("waits", "lingers") and not noted and time.monotonic() < until:
    time.sleep(0.05)
until = time.monotonic() + {"waits": 0.3, "lingers": 2}.get(sys.argv[1], 0)
while time.monotonic() < until:
    time.sleep(0.05)
print("got", noted, flush=True)
sys.exit(3 if sys.argv[1] == "fails" else 0)
"""


@pytest.fixture(autouse=True)
def no_tlparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onegraph.debug.tlparse_report._tlparse", lambda: None)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A program that leaves a trace; its first argument says how it ends. The current folder is the test's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(COMMAND)
    log = write_trace(tmp_path / "log", entries(layers=2))
    return [sys.executable, str(tmp_path / "program.py"), "{ends}", str(log)]


def ending(command: list[str], ends: str) -> list[str]:
    return [word.format(ends=ends) for word in command]


def test_a_command_keeps_its_output_and_its_words(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--no-open", "--", *ending(command, "ends"), "--verbose", "--json"]) == 0
    told = capfd.readouterr()
    assert "its own output" in told.out and "'--verbose', '--json'" in told.out
    page = Path(told.out.splitlines()[-1])
    assert page.name == "index.html" and page.is_file()
    assert page.parent.name.startswith("onegraph-trace-20")
    assert page.parent.parent == Path.cwd()
    assert "exit code 0" in told.err
    assert json.loads((page.parent / "facts.json").read_text())["run"]["exit_code"] == 0


def test_a_command_that_fails_is_shown(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--out", "report", "--json", "--", *ending(command, "fails")]) == 1
    told = capfd.readouterr()
    facts = json.loads(told.out)  # nothing else is there
    assert facts["run"]["exit_code"] == 3
    assert facts["processes"][0]["start"] == "cold"
    assert "its own output" in told.err
    assert "The command ended with exit code 3" in Path("report/index.html").read_text()


def started(command: list[str], **options: Any) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "onegraph.cli.main", "trace", "--out", "report", "--", *ending(command, "waits")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert process.stdout is not None
    for text in process.stdout:
        if "its own output" in text:
            return process
    raise AssertionError("it ended before")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_goes_to_the_command(command: list[str], name: str) -> None:
    process = started(command)
    process.send_signal(getattr(signal, name))
    told, _ = process.communicate(timeout=60)
    assert f"got ['{name}']" in told
    assert process.returncode == 0
    assert Path("report/index.html").is_file()


def test_a_signal_to_the_group_comes_once(command: list[str]) -> None:
    process = started(command, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert "got ['SIGINT']" in told
    assert process.returncode == 0


def test_ctrl_c_of_a_terminal_comes_once(command: list[str]) -> None:
    """The terminal sends it to both; both have the terminal as theirs."""
    words = ["-m", "onegraph.cli.main", "trace", "--no-open", "--out", "report", "--", *ending(command, "lingers")]
    with terminal(words) as one:
        one.expect("its own output")
        one.type("\x03")
        one.expect("got ['SIGINT']")
        assert one.end() == 0
    assert Path("report/index.html").is_file()


def test_a_trace_that_was_written_before(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", "--from", "log", "--out", "report"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report/index.html'}\n"
    assert main(["trace", "--out", "again", "--", *ending(command, "fails")]) == 1
    (tmp_path / "again/index.html").unlink()
    assert main(["trace", "--from", "again", "--compare", "report"]) == 1  # as its command, which is remembered
    assert "Differences" in (tmp_path / "again/index.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--"], "there is no command after --"),
        (["--dtype", "float32", "--", "true"], "--dtype is for `onegraph run`"),
        (["-O3", "--from", "log"], "-O3 is for `onegraph run`"),
        (["--from", "log", "--", "true"], "runs no command"),
        (["--outt", "x"], "did you mean '--out'"),
        (["-O.modee=0"], "did you mean 'mode'"),
    ],
)
def test_bad_usage(command: list[str], capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert main(["trace", *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(Path.cwd().glob("onegraph-trace-*"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--", sys.executable, "-c", "pass"], "there is no trace"),
        (["--", sys.executable, "-c", "1 / 0"], "the command ended with exit code 1 before it wrote a trace"),
        (["--", "/nowhere/program"], "the command can't be started"),
        (["--from", "/nowhere"], "there is no trace"),
        (["--compare", "/nowhere", "--", "true"], "there are no facts of a trace"),
    ],
)
def test_what_cannot_be_had(
    command: list[str], capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main(["trace", "--out", "report", *words]) == 1
    shown = capsys.readouterr().err
    assert "[OG-TRACE]" in shown and told in shown and "to do:" in shown
    assert "Traceback" not in shown


def test_one_folder_is_for_one_run(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--out", "report", "--", *ending(command, "ends")]) == 0
    assert main(["trace", "--out", "report", "--", *ending(command, "ends")]) == 1
    assert "there is a trace already" in capsys.readouterr().err
