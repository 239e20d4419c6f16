"""The reader of torch's structured trace: what is whole is read, what isn't is told, and nothing ends it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from onegraph.debug import trace_log
from onegraph.debug.report_facts import process_facts
from onegraph.debug.tlparse_report import TlparseReport
from onegraph.debug.trace_log import find_logs, read_trace_log
from tests.debug.written_trace import HOSTILE, entries, entry, line, write_trace


@pytest.fixture(autouse=True)
def without_tlparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reports are looked at elsewhere, and take time."""
    monkeypatch.setattr("onegraph.debug.report.render_with_tlparse", lambda log, folder: TlparseReport(None, "off"))


def read(folder: Path, text: str | bytes) -> trace_log.TraceLog:
    path = folder / "dedicated_log_torch_trace_x.log"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    [log] = read_trace_log(path)
    return log


def test_entries_by_name_and_torch_s_own_counted(tmp_path: Path) -> None:
    [log] = read_trace_log(write_trace(tmp_path, {"captured_graph": "a\n\n\tb", "config": {"mode": 1}}))
    assert log.entries["captured_graph"] == "a\n\n\tb"
    assert json.loads(log.entries["config"]) == {"mode": 1}
    assert log.torch_entries == {"dynamo_start": 1, "compilation_metrics": 1}
    assert log.pid == 4242
    assert log.problems == ()


def test_the_last_of_one_name_counts(tmp_path: Path) -> None:
    assert read(tmp_path, entry("config", {"a": 1}) + entry("config", {"a": 2})).entries == {"config": '{\n "a": 2\n}'}


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    """By torch's own formatter, whatever it puts into a line."""
    import logging

    from torch._logging._internal import TorchLogsFormatter

    record = logging.LogRecord("torch.__trace", logging.DEBUG, "/some/where] x.py", 7, "", (), None)
    record.metadata = {"artifact": {"name": "onegraph_config", "encoding": "json"}, "frame_id": 0}
    record.payload = '{"a":\n1}'
    log = read(tmp_path, TorchLogsFormatter(trace=True).format(record) + "\n")
    assert log.entries == {"config": '{"a":\n1}'}
    assert log.problems == ()


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    whole = entry("config", {"mode": {"value": 1, "why": "user"}}) + entry("captured_graph", "a\nb\nc")
    for end in range(0, len(whole), 7):
        log = read(tmp_path, whole[:end])
        facts = process_facts(log)
        assert facts["problems"] or facts["missing"]
    log = read(tmp_path, whole[:-3])
    assert log.problems == ("onegraph_captured_graph: not whole: the file was cut, or two processes wrote into it",)


def test_garbage_and_unknown_entries(tmp_path: Path) -> None:
    garbage = b"\x00\xff garbage\n\tpayload of nobody\nV1201 10:15:00.1 4 a.py:1] {broken\n" * 30
    log = read(
        tmp_path, garbage + entry("of_another_version", "x").encode() + b'V1201 10:15:00.1 4 a.py:1] {"new": {}}\n'
    )
    assert log.entries == {"of_another_version": "x"}
    assert log.torch_entries == {"new": 1}
    assert 1 < len(log.problems) <= 21
    assert log.problems[-1].startswith("and ")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    assert "no entry in the form" in read(tmp_path, "").problems[0]


def test_a_huge_payload_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_log, "_MOST_BYTES", 1000)
    log = read(tmp_path, entry("captured_graph", "x" * 99 + "\n" + "y\n" * 5000) + entry("config", {}))
    assert len(log.entries["captured_graph"]) <= 1000
    assert log.problems == ("onegraph_captured_graph: larger than 0 MiB, and cut",)
    assert log.entries["config"] == "{}"


def test_a_compile_that_torch_gave_up(tmp_path: Path) -> None:
    metrics = {"fail_type": "Unsupported", "fail_reason": "a break", "fail_user_frame_filename": "m.py"}
    log = read(tmp_path, line("compilation_metrics", {**metrics, "fail_user_frame_lineno": 3}))
    assert [one.to_dict() for one in log.failures] == [{"kind": "Unsupported", "reason": "a break", "user": "m.py:3"}]


def test_the_logs_of_a_folder(tmp_path: Path) -> None:
    """In the order in which they were begun, whichever was written last."""
    paths = [write_trace(tmp_path, {}, pid=pid) for pid in (3, 1)]
    (tmp_path / "other.log").write_text("")
    paths[1].write_text(paths[1].read_text().replace("10:15:00", "10:14:59"))
    paths[0].write_text(paths[0].read_text())
    assert find_logs(tmp_path) == [paths[1], paths[0]]
    assert find_logs(paths[0]) == [paths[0]]


def test_builds_of_one_process_are_apart(tmp_path: Path) -> None:
    """With what the process told last of itself; a compile that failed before any build is shown with each."""
    of_process = {"process": {"pid": 1}, "timeline": {"events": [], "ready_s": 2.0}}
    metrics = {"fail_type": "Unsupported", "fail_reason": "a break"}
    whole = [
        entry("config", {"a": 1}),
        entry("process", {"pid": 0}, frame=0),
        *(entry(name, f"first {name}", frame=0) for name in ("captured_graph", "piece_0_after_fuse_rotary")),
        line("compilation_metrics", metrics, frame=7),
        *(entry(name, value, frame=1) for name, value in of_process.items()),
        entry("captured_graph", "second", frame=1),
    ]
    path = tmp_path / "dedicated_log_torch_trace_x.log"
    path.write_text("".join(whole))
    first, second = read_trace_log(path)
    assert first.entries["captured_graph"] == "first captured_graph"
    assert second.entries["captured_graph"] == "second" and "piece_0_after_fuse_rotary" not in second.entries
    for log in (first, second):
        assert {name: json.loads(log.entries[name]) for name in of_process} == of_process
        assert json.loads(log.entries["config"]) == {"a": 1} and [one.kind for one in log.failures] == ["Unsupported"]


NAMES = [*entries(layers=2), "constraints", "ledger_evaluation"]


@pytest.mark.parametrize("value", [None, 3, [3], [None], {}, {"events": 3}, {"rows": [{}]}, "{", HOSTILE])
def test_an_entry_of_any_form_leaves_a_report(tmp_path: Path, value: object) -> None:
    """One entry at a time is something else: the others are shown, and no template meets it."""
    from onegraph.debug.report import build_report

    whole = entries(layers=2)
    keys = set(process_facts(*read_trace_log(write_trace(tmp_path / "whole", whole))))
    for name in NAMES if value in (None, 3) else ("explain", "store", "profile", "timeline", "ledger"):
        facts = process_facts(*read_trace_log(write_trace(tmp_path / "log", {**whole, name: value})))
        assert set(facts) == keys
        assert facts["config"] or name == "config"
    everything = dict.fromkeys(NAMES, value)
    report = build_report(tmp_path / "report", [write_trace(tmp_path / "log", everything)])
    assert report["processes"][0]["model"] is None


def test_inner_values_of_other_forms(tmp_path: Path) -> None:
    """Every value inside of every entry is replaced, one after the other, by one of another type."""
    from onegraph.debug.report import build_report

    whole = entries(layers=1)
    for name, value in whole.items():
        if isinstance(value, dict):
            for wrong in (dict.fromkeys(value, 7), {key: [{"index": "x"}, None] for key in value}):
                log = write_trace(tmp_path / "log", {**whole, name: wrong})
                (facts,) = build_report(tmp_path / "report", [log])["processes"]
                assert facts["texts"] and (facts["config"] or name == "config")
                assert (tmp_path / "report/index.html").read_text().endswith("</html>")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1e999", '"x"'])
def test_seconds_that_are_no_numbers(tmp_path: Path, number: str) -> None:
    from onegraph.debug.report import build_report

    text = write_trace(tmp_path / "log", entries(layers=2)).read_text()
    wrong = re.sub(r'("(?:seconds|start_s|seconds_per_step)": )[\d.]+', rf"\g<1>{number}", text)
    assert wrong != text
    path = tmp_path / "log" / "dedicated_log_torch_trace_4242.log"
    path.write_text(wrong)
    assert build_report(tmp_path / "report", [path])["processes"][0]["problems"]


def test_facts_of_a_decoder(tmp_path: Path) -> None:
    facts = process_facts(*read_trace_log(write_trace(tmp_path, entries(layers=60))))
    assert facts["problems"] == []
    assert facts["missing"] == []
    assert facts["start"] == "cold"
    assert [group["index"] for group in facts["pieces"]] == [0, 1, 2, 120]
    layer = facts["pieces"][2]
    assert len(layer["indices"]) == 59
    assert layer["module_paths"][0] == "model.layers.1"
    assert [region["region"] for region in layer["texts"]] == ["", "16 to 16"]
    assert [graph["pass"] for graph in layer["texts"][0]["graphs"]] == [None, "merge_linears", "fuse_rotary"]
    assert layer["ranges"][0]["folder"].endswith(layer["ranges"][0]["key"][:16])
    assert layer["ranges"][0]["differs"] == [{"field": "torch", "was": "2.12.0", "is": "2.13.0"}]
    assert facts["store"] == {
        "root": "/home/someone/.cache/onegraph",
        "index": {"status": "miss", "why": "no artifact has this key"},
        "hits": 0,
        "misses": 3,
        "off": 0,
    }
    assert sum(group["share"] for group in facts["pieces"]) == pytest.approx(0.954, abs=0.01)
    assert layer["kernels"][0]["name"] == "kernel_fused_linear_mul_0"
    assert layer["kernels"][0]["calls"] == 59
    assert facts["timeline"]["measured"]
    assert [size["num_tokens"] for size in facts["recordings"]["sizes"]] == [1, 2, 4, 8, 16]
    assert facts["config"][-1]["why"] == "default"
    assert facts["config"][0]["why"] != "default"


def test_an_old_trace_says_what_it_lacks(tmp_path: Path) -> None:
    whole = entries(layers=2)
    old = {name: whole[name] for name in ("config", "captured_graph", "ledger", "execution_plan", "explain")}
    facts = process_facts(*read_trace_log(write_trace(tmp_path, old)))
    assert set(facts["missing"]) == {
        f"onegraph_{name}" for name in ("process", "timeline", "split_graph", "store", "recording_plan", "recordings")
    }
    assert not facts["timeline"]["measured"]
    assert [event["name"] for event in facts["timeline"]["events"]] == ["capture", "compile or load"]
    assert facts["store"]["index"] == {"status": "miss", "why": "no artifact has this key"}
    assert [size["num_tokens"] for size in facts["recordings"]["sizes"]] == [1, 2, 4, 8, 16]


def test_a_refused_compile(tmp_path: Path) -> None:
    refused = {
        "expr": "Eq(Mod(num_tokens, 128), 0)",
        "user": "model.py:7",
        "framework": None,
        "stage": "capture",
        "effect": "narrows",
    }
    facts = process_facts(*read_trace_log(write_trace(tmp_path, {"constraints": [refused]})))
    assert facts["start"] == "refused"
    assert facts["constraints"][0]["user"] == "model.py:7"
