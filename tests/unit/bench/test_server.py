"""Servers in the benchmark: workload, figures, processes, and a tiny server that isn't a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import server
from bench.figures import add_ratios, level_figures, percentile, server_figures
from bench.processes import interpreter, reason, variables
from bench.server import ServerCommand, command, run_server
from bench.workloads import ServerWorkload

WORKLOAD = ServerWorkload(concurrency=(1, 2), prompt_len=4, output_len=3, rounds=2, min_requests=3)


def test_levels_have_enough_requests_and_no_prompt_twice() -> None:
    assert [WORKLOAD.num_requests(level) for level in (1, 2)] == [3, 4]
    assert [ServerWorkload().num_requests(level) for level in (1, 8, 32)] == [8, 24, 96]
    unmeasured, measured = ServerWorkload().prompts(50_000, 8)
    assert len(unmeasured) == 8 and len(measured) == 24
    assert len({tuple(prompt) for prompt in unmeasured + measured}) == 32
    assert ServerWorkload().prompts(50_000, 8) == (unmeasured, measured), "the same for every engine"


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 95) == pytest.approx(4.8)
    assert percentile([7.0], 95) == 7.0


def answer(ttft_ms: float, tpot_ms: float) -> dict[str, Any]:
    return {"tokens": 3, "ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "gaps_ms": [tpot_ms, tpot_ms]}


def test_figures_of_a_level() -> None:
    found = level_figures([answer(100.0, 10.0), answer(300.0, 30.0)], seconds=2.0)
    assert found["output_tokens_per_s"] == 3.0
    assert found["ttft_p50_ms"] == 200.0 and found["ttft_p95_ms"] == pytest.approx(290.0)
    assert found["tpot_p50_ms"] == 20.0
    assert found["requests"]["ttft_ms"] == [100.0, 300.0] and found["requests"]["events"] == 6


def test_figures_are_over_repeats_and_keep_failures() -> None:
    one, two = (level_figures([answer(ms, 10.0)], 1.0) for ms in (100.0, 200.0))
    runs = [
        {"ready_s": 4.0, "levels": {"1": one, "2": {"failed": "timeout"}}, "load_average_before": 0.1},
        {"ready_s": 6.0, "levels": {"1": two, "2": {"failed": "timeout"}}, "load_average_before": 0.2},
        {"failed": "exit code 1"},
    ]
    found = server_figures(WORKLOAD, runs)
    assert found["ready_s"]["median"] == 5.0 and found["failed"] == ["exit code 1"]
    assert found["levels"]["1"]["ttft_p50_ms"]["all"] == [100.0, 200.0]
    assert found["levels"]["2"] == {"failed": ["timeout", "timeout"]}


def test_ratios_above_1_say_that_the_first_is_better() -> None:
    def engine(ready_s: float, tokens: float, ttft: float) -> dict[str, Any]:
        level = {"output_tokens_per_s": {"median": tokens}, "ttft_p50_ms": {"median": ttft}}
        return {"ready_s": {"median": ready_s}, "levels": {"1": level}}

    engines = {"a": engine(10.0, 100.0, 50.0), "b": engine(20.0, 50.0, 25.0), "c": {"failed": [], "levels": {"1": {}}}}
    add_ratios(engines)
    assert engines["b"]["ratio"]["ready_s"] == 2.0
    assert engines["b"]["levels"]["1"]["ratio"]["output_tokens_per_s"] == 2.0
    assert engines["b"]["levels"]["1"]["ratio"]["ttft_p50_ms"] == 0.5
    assert engines["c"]["levels"]["1"]["ratio"]["ttft_p50_ms"] is None and engines["c"]["ratio"]["ready_s"] is None


def test_all_servers_listen_here_alone_and_get_the_same_flags() -> None:
    for engine in server.SERVERS:
        words = command(engine, "python", Path("model"), 1234)
        assert words[words.index("--host") + 1] == "127.0.0.1" and words[words.index("--port") + 1] == "1234"
        assert words[words.index("--max-model-len") + 1] == "1024"


def test_vllm_runs_in_its_own_interpreter_with_its_caches_in_the_folder(tmp_path: Path) -> None:
    assert interpreter("onegraph", None) == sys.executable
    with pytest.raises(ValueError, match="--vllm-python"):
        interpreter("vllm", None)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libiomp5.so").touch()
    python = tmp_path / "bin/python"
    assert interpreter("vllm-eager", python) == str(python)
    found = variables("vllm", tmp_path / "cache", python)
    caches = [found[name] for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
    assert all(cache.startswith(str(tmp_path / "cache")) for cache in caches)
    assert found["LD_PRELOAD"].startswith(str(tmp_path / "lib/libiomp5.so"))
    assert "src" not in found["PYTHONPATH"], "the other interpreter sees the benchmark, and not onegraph"
    assert "VLLM_CACHE_ROOT" not in variables("onegraph", tmp_path / "cache", python)


def test_a_failure_is_told_by_the_line_that_names_the_error() -> None:
    assert reason("Traceback\nValueError: no /home/someone/x\nshutting down\n") == "ValueError: no …/x"
    assert reason("one\ntwo\n") == "two"
    assert reason("") == "no output"


SERVE = """
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    started = False
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" and Handler.started else 503); self.end_headers()
        Handler.started = True
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        n = body["max_tokens"]
        self.send_response(200); self.end_headers()
        for said in [{"choices": [{"text": "x"}]}] * n + [{"choices": [], "usage": {"completion_tokens": n}}]:
            self.wfile.write(b"data: " + json.dumps(said).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_tiny_server_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100}))
    monkeypatch.setitem(server.SERVERS, "tiny", ServerCommand(("-c", SERVE), "/ready"))
    monkeypatch.setitem(server.SERVERS, "broken", ServerCommand(("-c", "raise SystemExit('OSError: no')"), "/ready"))
    run = run_server("tiny", tmp_path, WORKLOAD, tmp_path / "cache", 30.0, None)
    assert run["ready_s"] > 0 and [len(run["levels"][level]["requests"]["ttft_ms"]) for level in "12"] == [3, 4]
    found = server_figures(WORKLOAD, [run])
    assert found["levels"]["2"]["output_tokens_per_s"]["median"] > 0
    broken = run_server("broken", tmp_path, WORKLOAD, tmp_path / "cache", 30.0, None)
    assert broken == {"failed": "the server ended with exit code 1: OSError: no"}
