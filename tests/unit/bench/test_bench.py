"""The benchmark's own arithmetic, and one tiny run of the harness end to end."""

from __future__ import annotations

import argparse
import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import worker
from bench.__main__ import Harness, checked, chosen_engines, chosen_to_leave_out, chosen_workloads, measure, names
from bench.figures import add_ratios, figures, summary
from bench.models import SHAPES, make_config, make_tokenizer
from bench.processes import ROOT, run_in_own_group, without_paths
from bench.table import text_table
from bench.workloads import WORKLOADS, ServerWorkload, Workload


@pytest.mark.parametrize(("shape", "millions"), [("135m", 134.5), ("qwen3-0.6b", 596.0)])
def test_shapes_have_the_sizes_that_their_names_say(shape: str, millions: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(shape))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


def test_toys_are_small() -> None:
    assert SHAPES["toy-30"]["num_hidden_layers"] == 30 and SHAPES["toy-30"]["hidden_size"] == 64
    assert SHAPES["toy-4"]["num_hidden_layers"] == 4


def test_prompts_are_the_same_for_every_engine() -> None:
    workload = WORKLOADS["offline"]
    assert workload.prompts(100) == workload.prompts(100)
    assert len(workload.prompts(100)) == 64 and len(workload.prompts(100)[0]) == 128
    assert 0 not in {token for prompt in workload.prompts(50) for token in prompt}


def test_medians_and_spread() -> None:
    one = summary([3.0, 1.0, 2.0])
    assert one == {"median": 2.0, "iqr": 1.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}
    assert summary([5.0])["iqr"] == 0.0


def test_figures_count_all_requests_and_keep_failures() -> None:
    workload = Workload("w", 4, 8, 10, "filled", "generate")
    found = figures(workload, [{"seconds": 2.0, "tokens": 40}, {"failed": "took too long"}])
    assert found["tokens_per_s"]["median"] == 20.0
    assert found["ms_per_token"]["median"] == 200.0, "a request's own pace: 2 s for its 10 tokens"
    assert found["failed"] == ["took too long"]
    assert "seconds" not in figures(workload, [{"failed": "no"}])


def test_generation_is_timed_after_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A static cache compiles for each batch size and length: a smaller warm-up leaves a compile to the clock."""
    (tmp_path / "config.json").write_text('{"vocab_size": 100, "dtype": "bfloat16"}')
    calls: list[tuple[int, int]] = []
    compiled: set[tuple[int, int]] = set()

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        calls.append((len(prompts), num_tokens))
        compiled.add(calls[-1])
        return len(prompts) * num_tokens

    closed: list[bool] = []
    fake = worker.Engine(
        generate, lambda: {"threads": 3, "graphs": len(compiled), "peak_rss_mib": 7}, lambda: closed.append(True)
    )
    monkeypatch.setitem(worker.ENGINES, "fake", lambda model: fake)
    start = Workload("s", 1, 8, 1, "filled", "first_token")
    first, run = worker.main("fake", str(tmp_path), [start, Workload("w", 6, 8, 10, "filled", "generate")], 0.0)
    assert first["tokens"] == 1 and calls == [(1, 1), (6, 10), (6, 10)]
    assert run["compiled_while_timed"] == 0 and run["tokens"] == 60
    assert run["threads"] == 3 and run["peak_rss_mib"] == 7 and run["dtype"] == "bfloat16" and closed == [True]


def test_seconds_that_hold_compiling_are_refused() -> None:
    good = {"seconds": 2.0, "tokens": 40, "compiled_while_timed": 0}
    assert checked(good) == good
    assert "compiled 2 graphs" in checked({**good, "compiled_while_timed": 2})["failed"]


def test_graphs_compiled_counts_what_torch_compile_does() -> None:
    before = worker.graphs_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert worker.graphs_compiled() == before + 1


def test_a_timeout_ends_what_the_process_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    script = f"sleep 60 & echo $! > {child}; wait"
    assert run_in_own_group(["sh", "-c", script], dict(os.environ), 1.0)[0] is None
    pid = int(child.read_text())
    status = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 5
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_harness_that_is_told_to_end_leaves_nothing_running(tmp_path: Path) -> None:
    """SIGTERM ended the harness alone, and an engine stayed to load the machine for half an hour."""
    words = ["--shape", "toy-4", "--engines", "transformers", "--workloads", "warm_start", "--out", str(tmp_path / "x")]
    with subprocess.Popen(
        [sys.executable, "-m", "bench", *words], env={**os.environ, "TMPDIR": str(tmp_path)}, cwd=ROOT
    ) as harness:

        def workers() -> list[str]:
            found = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
            return [entry.name for entry in found if str(tmp_path).encode() in command_line(entry)]

        deadline = time.monotonic() + 60
        while not any(name != str(harness.pid) for name in workers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        harness.send_signal(signal.SIGTERM)
        assert harness.wait(20) == 143
        assert workers() == [] and not list(tmp_path.glob("onegraph-bench-*"))


def command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def test_failures_name_no_folders() -> None:
    told = without_paths("No such file: '/home/someone/models/config.json' (1/2 done)")
    assert told == "No such file: '…/config.json' (1/2 done)"


def test_ratios_are_to_the_first_engine() -> None:
    engines: dict[str, dict[str, Any]] = {
        "a": {"tokens_per_s": {"median": 10.0}},
        "b": {"tokens_per_s": {"median": 20.0}},
        "c": {"failed": ["timeout"]},
    }
    add_ratios(engines)
    assert [found["ratio"] for found in engines.values()] == [1.0, 0.5, None]


def test_a_tiny_run_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["toy-30"], "num_hidden_layers": 1})
    workload = Workload("first", 1, 4, 1, "filled", "first_token")
    facts: dict[str, Any] = measure("tiny", [workload], ["onegraph-eager", "transformers"], 1, 120.0, tmp_path)
    engines = facts["workloads"]["first"]["engines"]
    assert all(found["seconds"]["median"] > 0 and not found["failed"] for found in engines.values()), engines
    assert all(found["dtype"] == ["bfloat16"] and found["threads"] == [1] for found in engines.values()), engines
    assert facts["environment"]["torch"] == torch.__version__
    assert "onegraph-eager" in text_table(facts)


def test_a_cold_start_that_was_measured_fills_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start of some engines takes minutes; one that is made anyway isn't made twice."""
    ran: list[tuple[str, str, str]] = []

    def run_once(engine: str, model: Path, workloads: list[Workload], cache: Path, *more: Any) -> list[dict[str, Any]]:
        ran.append((engine, " ".join(workload.name for workload in workloads), cache.name))
        return [{"failed": "no"} if engine == "b" else {"seconds": 1.0, "tokens": 1, "peak_rss_mib": 1}] * len(
            workloads
        )

    monkeypatch.setattr("bench.__main__.run_once", run_once)
    harness = Harness(tmp_path, tmp_path, repeats=1, timeout_s=1.0)
    harness.measure({WORKLOADS["cold_start"]: ["a", "b"]})
    found = harness.measure({WORKLOADS["warm_start"]: ["a", "b"], WORKLOADS["offline"]: ["a"]})
    assert list(found["offline"]["engines"]) == ["a"]
    assert ran == [
        ("a", "cold_start", "cold_start-a-0"),
        ("b", "cold_start", "cold_start-b-0"),
        ("a", "warm_start offline", "cold_start-a-0"),
        ("b", "cold_start", "filled-b"),
        ("b", "warm_start", "filled-b"),
    ]


def test_generation_alone_needs_no_start_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def run_once(engine: str, model: Path, workloads: list[Workload], cache: Path, *more: Any) -> list[dict[str, Any]]:
        ran.append((" ".join(workload.name for workload in workloads), cache.name))
        return [{"seconds": 1.0, "tokens": 1, "peak_rss_mib": 1}] * len(workloads)

    monkeypatch.setattr("bench.__main__.run_once", run_once)
    generation = {WORKLOADS["single_stream"]: ["a"], WORKLOADS["offline"]: ["a"]}
    Harness(tmp_path, tmp_path, repeats=2, timeout_s=1.0).measure(generation)
    assert ran == [("single_stream offline", "filled-a")] * 2


def flags(**changed: Any) -> argparse.Namespace:
    given = {
        "workloads": "offline,server",
        "engines": "onegraph,vllm",
        "offline_requests": 5,
        "concurrency": "2,4",
        "rounds": 1,
        "min_requests": 1,
        "leave_out": "",
        "vllm_python": None,
    }
    return argparse.Namespace(**{**given, **changed})


def test_flags_choose_workloads_and_sizes() -> None:
    offline, server = chosen_workloads(flags())
    assert isinstance(offline, Workload) and offline.num_requests == 5
    assert isinstance(server, ServerWorkload) and server.concurrency == (2, 4) and server.num_requests(4) == 4
    assert chosen_to_leave_out(flags(leave_out="server:vllm,offline:vllm")) == {("server", "vllm"), ("offline", "vllm")}
    with pytest.raises(ValueError, match="'servre'"):
        chosen_to_leave_out(flags(leave_out="servre:vllm"))
    with pytest.raises(ValueError, match="known: a"):
        names("b", ["a"], "engine")


def test_vllm_is_skipped_where_its_interpreter_is_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen_engines(flags()) == ["onegraph"]
    assert "skipped: vllm (no --vllm-python was given)" in capsys.readouterr().err
    assert chosen_engines(flags(vllm_python=Path("python"))) == ["onegraph", "vllm"]


def test_the_worker_runs_where_only_python_is() -> None:
    """vLLM's interpreter has neither onegraph nor this environment."""
    script = "import bench.worker, sys; print(sorted({name.split('.')[0] for name in sys.modules}))"
    asked = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=True
    )
    assert not {"onegraph", "torch", "transformers"} & set(ast.literal_eval(asked.stdout))


def test_each_token_of_a_model_has_a_text_of_its_own() -> None:
    tokenizer = make_tokenizer(300)
    texts = [tokenizer.decode([i]) for i in range(300)]
    assert len(set(texts)) == 300 and all(texts) and not any("\ufffd" in text for text in texts)
    ids = tokenizer.encode("def f(x):\n").ids
    assert len(ids) == 10 and tokenizer.decode(ids) == "def f(x):\n"
