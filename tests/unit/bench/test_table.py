"""Tables of results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import table
from bench.figures import add_ratios, summary
from bench.table import markdown_table, number, text_table


def facts() -> dict[str, Any]:
    starts: dict[str, Any] = {
        "onegraph": {"failed": [], "seconds": summary([10.0, 12.0])},
        "vllm": {"failed": [], "seconds": summary([22.0])},
        "transformers": {"failed": ["timeout"]},
    }
    level = {"failed": [], "output_tokens_per_s": summary([400.0]), "ttft_p50_ms": summary([30.0])}
    servers: dict[str, Any] = {
        "onegraph": {"failed": [], "ready_s": summary([8.0]), "levels": {"8": level}},
        "vllm": {"failed": ["exit code 1"], "levels": {"8": {"failed": []}}},
    }
    add_ratios(starts)
    add_ratios(servers)
    return {
        "workloads": {
            "cold_start": {"workload": {"measure": "first_token"}, "engines": starts},
            "server": {"workload": {"concurrency": [8]}, "engines": servers},
        }
    }


def test_markdown_has_medians_and_ratios_to_the_first() -> None:
    lines = markdown_table(facts()).splitlines()
    assert lines[0] == "| | onegraph | vllm | transformers |"
    assert lines[2] == "| cold start, s | 11.0 | 22.0 (2.00) | failed |"
    assert lines[3] == "| server: time to ready, s | 8.00 | failed | – |"
    assert lines[4] == "| server, 8 concurrent, tokens/s | 400 | failed | – |"
    assert lines[5] == "| server, 8 concurrent: first token, median, ms | 30.0 | failed | – |"


def test_numbers_have_the_digits_that_matter() -> None:
    assert [number(value) for value in (1.234, 12.34, 123.4, 1234.5)] == ["1.23", "12.3", "123", "1234"]


def test_the_terminal_sees_the_spread_and_the_reason() -> None:
    told = text_table(facts())
    assert "10.0..12.0" in told and "timeout" in told and "exit code 1" in told


def test_the_command_reads_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "result.json").write_text(json.dumps(facts()))
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path / "result.json")])
    assert table.main() == 0
    assert "| cold start, s |" in capsys.readouterr().out


def test_results_of_before_can_still_be_shown() -> None:
    result = Path(__file__).parents[3] / "bench/results/2026-11-24-135m.json"
    assert "| cold start, s | 37.4 |" in markdown_table(json.loads(result.read_text()))
