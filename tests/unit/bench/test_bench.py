"""The benchmark's own arithmetic, and one tiny run of the harness end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.__main__ import figures, measure, summary, table
from bench.models import SHAPES, make_config
from bench.workloads import WORKLOADS, Workload


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
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}


def test_figures_count_all_requests_and_keep_failures() -> None:
    workload = Workload("w", 4, 8, 10, "filled", "generate")
    found = figures(workload, [{"seconds": 2.0, "tokens": 40}, {"failed": "took too long"}])
    assert found["tokens_per_s"]["median"] == 20.0
    assert found["ms_per_token"]["median"] == 200.0, "a request's own pace: 2 s for its 10 tokens"
    assert found["failed"] == ["took too long"]
    assert "seconds" not in figures(workload, [{"failed": "no"}])


def test_a_tiny_run_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(SHAPES, "tiny", {**SHAPES["toy-30"], "num_hidden_layers": 1})
    workload = Workload("first", 1, 4, 1, "filled", "first_token")
    facts: dict[str, Any] = measure("tiny", [workload], ["onegraph-eager", "transformers"], 1, 120.0, tmp_path)
    engines = facts["workloads"]["first"]["engines"]
    assert all(found["seconds"]["median"] > 0 and not found["failed"] for found in engines.values()), engines
    assert facts["environment"]["torch"] == torch.__version__
    assert "onegraph-eager" in table(facts)
