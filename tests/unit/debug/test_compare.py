"""What differs between two traces, as data."""

from __future__ import annotations

from pathlib import Path

import pytest

from onegraph.debug.compare import compare, read_facts
from onegraph.debug.report import build_report
from onegraph.errors import TraceError
from tests.debug.written_trace import entries, write_trace


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cold")
    build_report(folder, [write_trace(folder / "trace", entries(layers=3))])
    return folder


def test_a_trace_beside_itself(cold: Path) -> None:
    facts = read_facts(cold)["processes"][0]
    topics = compare(facts, facts)
    assert {topic for topic, rows in topics.items() if rows} == {"time"}
    assert all(row["was"] == row["is"] for row in topics["time"])


def test_what_changed(cold: Path, tmp_path: Path) -> None:
    changed = entries(layers=3, warm=True)
    changed["config"]["mode"] = {"value": "NONE", "why": "user"}
    changed["explain"]["graph"]["ops"] = 1835
    changed["process"]["versions"]["torch"] = "2.14.0"
    changed["piece_2_output_code"] += "\nreturn 1"
    del changed["split_graph"]
    build_report(tmp_path, [write_trace(tmp_path / "trace", changed)], other=cold)
    topics = read_facts(tmp_path)["compare"][0]["topics"]
    assert topics["config"] == [{"name": "mode", "was": "ONEGRAPH", "is": "NONE", "why": "-O2 → user"}]
    assert topics["graph"] == [{"name": "operations", "was": 1834, "is": 1835, "why": ""}]
    assert topics["versions"] == [{"name": "torch", "was": "2.13.0", "is": "2.14.0", "why": ""}]
    code = {row["name"]: row for row in topics["code"]}
    assert set(code) == {"piece_2_output_code", "split_graph"}
    assert code["split_graph"]["is"] is None
    store = {row["name"]: (row["was"], row["is"]) for row in topics["store"]}
    assert store["start"] == ("cold", "warm")
    assert store["piece 2"] == ("miss", "hit")
    times = {row["name"]: row["is"] / row["was"] for row in topics["time"]}
    assert times["capture"] == pytest.approx(0.1)
    assert "+return 1" in (tmp_path / "pages/compare-piece_2_output_code.html").read_text()


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99, "processes": []}', '{"format": 1}'])
def test_what_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "facts.json").write_text(text)
    for place in (tmp_path, tmp_path / "facts.json", tmp_path / "nothing"):
        with pytest.raises(TraceError, match="OG-TRACE"):
            read_facts(place)


def test_a_report_of_another_form(cold: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_text('{"format": 1, "processes": [{"config": 3}]}')
    with pytest.raises(TraceError, match="can't be compared"):
        build_report(tmp_path / "report", [next((cold / "trace").iterdir())], other=tmp_path)
