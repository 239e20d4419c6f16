"""`onegraph bench`: figures, a profile with its timeline and its entry in a trace, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onegraph.cli.main import main

SMALL = ["--num-kv-blocks", "256", "-O.backend=eager"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, session_cache_root: Path) -> Path:
    """Where a run wrote its facts, its timeline and its trace."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["--requests", "2", "--prompt-len", "20", "--output-len", "6", "--rounds", "2", "--profile", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "onegraph.cli.main", "bench", *SMALL, *words, "--perfetto", str(folder / "steps.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TORCH_TRACE": str(folder / "trace"), "ONEGRAPH_CACHE_ROOT": str(session_cache_root)},
    )
    assert result.returncode == 0, result.stderr
    (folder / "facts.json").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "facts.json").read_text()))


def test_figures_are_medians_with_their_spread(facts: dict[str, Any]) -> None:
    assert (facts["requests"], facts["prompt_len"], facts["output_len"], facts["rounds"]) == (2, 20, 6, 2)
    for name in ("output_tokens_per_s", "decode_step_ms", "first_token_ms"):
        one = facts[name]
        assert 0 < one["min"] <= one["q1"] <= one["median"] <= one["q3"] <= one["max"]


def test_a_profile_of_the_prefill_and_of_decoding(facts: dict[str, Any]) -> None:
    prefill, decode = facts["profile"]["prefill"], facts["profile"]["decode"]
    assert prefill["batches"] == [{"num_tokens": 40, "num_seqs": 2, "kind": "prefill", "count": 1}]
    assert decode["batches"] == [{"num_tokens": 2, "num_seqs": 2, "kind": "decode", "count": 4}]
    for profile in (prefill, decode):
        assert {"path", "calls_per_step", "seconds_per_step", "ops", "user", "module_path"} == set(profile["rows"][0])


def test_the_timeline_has_both(folder: Path) -> None:
    events = json.loads((folder / "steps.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {1: "prefill", 2: "decode"}
    assert {event["pid"] for event in events if event["name"] == "step"} == {1, 2}


def test_a_trace_has_the_profile_of_decoding_last(folder: Path, facts: dict[str, Any]) -> None:
    (log,) = (folder / "trace").iterdir()
    report = folder / "report"
    tlparse = str(Path(sys.executable).parent / "tlparse")
    rendered = subprocess.run([tlparse, str(log), "-o", str(report), "--no-browser"], capture_output=True, text=True)
    assert rendered.returncode == 0, rendered.stderr
    entries = [json.loads(path.read_text()) for path in report.rglob("onegraph_profile*.json")]
    assert facts["profile"]["decode"] in entries


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--requests", "0"], "--requests takes 1 or more, not 0"),
        (["--output-len", "2"], "--output-len takes 3 or more, not 2"),
        (["--perfetto", "steps.json"], "--perfetto writes what --profile measures"),
        (["--profile", "--perfetto", "nowhere/steps.json"], "nowhere/steps.json is no file in a folder"),
        (["--profil"], "did you mean '--profile'"),
    ],
)
def test_bad_usage(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert told in capsys.readouterr().err
