"""Each command: help with an example, facts as JSON, exit codes, and no word on the network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onegraph.cli.main import COMMANDS, main
from onegraph.config.compilation import FIELDS
from onegraph.config.engine import EngineConfig


def onegraph(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onegraph.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **variables},
    )


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_has_an_example_that_is_a_command_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    assert f"usage: onegraph {command}" in text
    assert re.search(rf"example:\n  onegraph {command}", text)
    assert "--json" in text
    assert "--verbose" in text


@pytest.mark.parametrize(
    "command", [*sorted(set(COMMANDS) - {"doctor", "cache", "debug"}), "cache why", "debug run", "debug edit"]
)
def test_commands_that_load_a_model_take_all_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    for name in set(EngineConfig.__dataclass_fields__) - {"model", "compilation_config"}:
        assert f"--{name.replace('_', '-')}" in text
    assert "-O3" in text
    for name, info in FIELDS.items():
        assert re.search(rf"\b{name} +{re.escape(info.doc)}", text)


def test_the_help_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_run_prints_texts_and_opens_no_socket(tmp_path: Path) -> None:
    """An audit hook sees every connection and name look-up of the process, whichever library makes it."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text("""
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        sys.stderr.write(f"\\nNETWORK {event} {arguments!r}\\n")
sys.addaudithook(watch)
""")
    variables = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    seen = subprocess.run(
        [sys.executable, "-c", "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    assert "NETWORK socket.connect" in seen.stderr  # the hook is there and sees
    variables["HF_HUB_OFFLINE"] = "0"  # nothing but onegraph itself keeps the process off the network
    result = onegraph("run", "-O.backend=eager", "--prompt", "def ", "--max-tokens", "4", **variables)
    assert result.returncode == 0, result.stderr
    assert "NETWORK" not in result.stderr
    assert "--- 'def '" in result.stdout
    assert "4 tokens in" in result.stdout


def test_run_prints_json() -> None:
    result = onegraph("run", "--enforce-eager", "--prompt", "def ", "--prompt", "import ", "--max-tokens=3", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert [output["prompt"] for output in facts["outputs"]] == ["def ", "import "]
    assert facts["tokens"] == 6
    assert facts["explain"]["config"]["mode"] == {"value": "NONE", "why": "enforce_eager"}


def test_a_model_that_is_not_there_fails_in_one_block() -> None:
    result = onegraph("run", "/nowhere/model", "--enforce-eager")
    assert result.returncode == 1
    assert "/nowhere/model" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("limit", ["--max-num-seqs=1", "--max-model-len=5", "--max-num-batched-tokens=1"])
def test_limits_of_one(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "-O.backend=eager", "--prompt=def ", "--prompt=import os", "--max-tokens=2", "--json"]
    assert main(words) == 0
    expected = json.loads(capsys.readouterr().out)["outputs"]
    code = main([*words, limit])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert json.loads(shown.out)["outputs"] == expected


@pytest.mark.parametrize("word", ["--dtype=float23", "--max-num-seqs=0", "--seed=x", "--max-tokens=0"])
def test_a_value_that_makes_no_sense_is_bad_usage(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--enforce-eager", word]) == 2
    told = capsys.readouterr().err
    assert word.removeprefix("--").split("=")[0].replace("-", "_") in told.replace("-", "_")
    assert "Traceback" not in told


def test_explain_shows_the_plan_of_a_graph_that_is_split() -> None:
    split = '-O.splitting_ops=["onegraph::write_kv_cache", "onegraph::paged_attention"]'
    result = onegraph("explain", "-O.backend=eager", split, "--plan")
    assert result.returncode == 0, result.stderr
    assert "9: 5 compiled, of which 3 differ, and 4 of splitting ops" in result.stdout
    assert "__pieces[8](__args)" in result.stdout


def test_explain_prints_json_with_the_promised_keys() -> None:
    result = onegraph("explain", "-O.backend=eager", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert {"model", "config", "stages", "dims", "ledger", "pieces", "plan", "check"} <= set(facts)
    assert facts["config"]["backend"] == {"value": "eager", "why": "user"}
    assert {piece["backend"] for piece in facts["pieces"]} == {"eager"}
    assert [piece["kind"] for piece in facts["pieces"]] == ["compiled", "splitting_op"] * 4 + ["compiled"]
    assert {stage["name"] for stage in facts["stages"]} >= {"capture"}
    assert all(stage["seconds"] >= 0 for stage in facts["stages"])


def test_an_unknown_variable_stops_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONEGRAPH_CASH_ROOT", "/tmp")
    for command in ("run", "serve", "explain", "config"):
        assert main([command]) == 2
        assert "did you mean 'ONEGRAPH_CACHE_ROOT'" in capsys.readouterr().err


def test_without_a_compiler_enforce_eager_and_warm_starts_run(fresh_cache: Path) -> None:
    words = ("run", "--prompt", "def ", "--max-tokens", "2")
    eager = onegraph(*words, "--enforce-eager", PATH="/nowhere")
    assert eager.returncode == 0, eager.stderr
    compiled = onegraph(*words, PATH="/nowhere")
    assert compiled.returncode == 1
    assert "[OG-COMPILE] there is no working C++ compiler" in compiled.stderr
    assert "apt-get install g++" in compiled.stderr
    assert "Traceback" not in compiled.stderr
    with_compiler = onegraph(*words)
    assert "start     cold" in with_compiler.stdout, with_compiler.stderr
    warm = onegraph(*words, PATH="/nowhere")
    assert "start     warm" in warm.stdout, warm.stderr


def test_a_cache_root_that_was_asked_for_and_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(tmp_path / "file/cache"))
    assert main(["run", "--prompt", "def "]) == 1
    told = capsys.readouterr().err
    assert "[OG-ARTIFACT]" in told
    assert str(tmp_path / "file/cache") in told
    assert "ONEGRAPH_DISABLE_COMPILE_CACHE=1" in told
