"""The benchmark of a GPU: its arithmetic, and all of its flow on the CPU with a model that is tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cuda, cuda_generation
from bench.models import SHAPES, make_config
from bench.worker import Engine

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}
ON_CPU = ["--shapes", "tiny", "--requests", "1,4", "--context", "20", "--repeats", "2", "--device", "cpu",
          "--dtype", "float32", "--backend", "eager", "--copy-bytes", "65536"]  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def test_bytes_and_the_limit() -> None:
    config = make_config("llama-8b")
    token_bytes = cuda.token_bytes_of(config, torch.bfloat16)
    assert token_bytes == 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, head size, bytes
    assert cuda.bytes_moved(16_000, token_bytes, 8, 1024) == 16_000 + 8 * 1024 * token_bytes
    figures = cuda.step_figures([(0.001, 0.004), (0.002, 0.004), (0.001, 0.004)], limit_ms=1.0)
    assert figures["median"] == 4.0 and figures["host_ms"] == 1.0 and figures["fraction_of_limit"] == 0.25


def test_requests_that_dont_fit_are_left_out() -> None:
    assert cuda.fitting([1, 8, 64], 1000, 10, 10, free_bytes=2100) == [1, 8]
    assert cuda.fitting([1], 1000, 10, 10, free_bytes=1100) == []


def test_the_budget_keeps_time_to_end() -> None:
    now = [0.0]
    budget = cuda.Budget(100, lambda: now[0])
    assert budget.left() == 100 - cuda.SPARE_S
    now[0] = 95.0
    assert budget.left() < 0


def test_lines_of_an_engine_become_figures() -> None:
    lines: list[dict[str, Any]] = [
        {"requests": 1, "tokens": 64, "seconds": 2.0, "tokens_per_s": 32.0},
        {"requests": 8, "tokens": 512, "seconds": 4.0, "tokens_per_s": 128.0},
        {"overhead": {"requests": 8, "step_ms": 2.0, "model_ms": 1.5, "outside_model_ms": 0.5}},
    ]
    found = cuda.generation_facts(lines)
    assert found["tokens_per_s"] == {"1": 32.0, "8": 128.0} and found["step_overhead"]["outside_model_ms"] == 0.5
    assert cuda.generation_facts([]) == {"tokens_per_s": {}}


def test_rounds_of_generation_are_measured_after_one_that_isnt() -> None:
    asked: list[int] = []

    def generate(prompts: list[list[int]], num_tokens: int) -> int:
        asked.append(len(prompts))
        return len(prompts) * num_tokens

    found = list(cuda_generation.generation(Engine(generate), [1, 4], lambda: [1, 2], 3))
    assert asked == [1, 1, 4, 4] and [one["tokens"] for one in found] == [3, 12]


def test_steps_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "facts.json"
    assert cuda.main([*ON_CPU, "--engines", "", "--out", str(out)]) == 0
    facts = json.loads(out.read_text())
    shape = facts["shapes"]["tiny"]
    assert "failed" not in shape and shape["left_out"] == [] and facts["generation"] == {}
    assert shape["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    for count in ("1", "4"):
        one = shape["steps"][count]
        assert one["bytes"] == shape["weight_bytes"] + int(count) * 20 * shape["kv_bytes_per_token"]
        assert set(one["engines"]) == {"eager", "compiled", "PIECEWISE", "FULL"}
        assert one["equals_compiled"] == {"PIECEWISE": True, "FULL": True}
        for mode in ("PIECEWISE", "FULL"):
            found = one["engines"][mode]
            assert found["replays"] == 6 and found["capture_s"] > 0 and found["median"] > 0
    shown = capsys.readouterr().out
    assert "1 requests, limit" in shown and "FULL: " in shown
    with pytest.raises(SystemExit):
        cuda.main([*ON_CPU, "--out", str(out)])  # results are kept as measured


def test_what_there_is_no_time_for_is_listed(tmp_path: Path) -> None:
    out = tmp_path / "facts.json"
    assert cuda.main([*ON_CPU, "--budget-s", "1", "--out", str(out)]) == 0
    facts = json.loads(out.read_text())
    assert facts["shapes"]["tiny"]["left_out"] == ["no time"]
    told = facts["generation"]["tiny"]["left_out"]
    assert told == [f"{engine}: no time" for engine in ("prepare", *cuda.ENGINES)]


@pytest.mark.full
def test_generation_on_the_cpu(tmp_path: Path) -> None:
    """All engines, in their own processes."""
    out = tmp_path / "facts.json"
    words = [*ON_CPU, "--requests", "1,2", "--shapes", "toy-4", "--output-len", "8", "--out", str(out)]
    assert cuda.main(words) == 0
    found = json.loads(out.read_text())["generation"]["toy-4"]
    assert found["left_out"] == []
    assert all(one["tokens_per_s"] for one in found["engines"].values())
    assert found["engines"]["onegraph"]["step_overhead"]["outside_model_ms"] > 0
