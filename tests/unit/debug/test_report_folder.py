"""Where a report may be written: a folder of its own, and never over what somebody else keeps there."""

from pathlib import Path

import pytest

from onegraph.cli.main import main
from onegraph.debug.report import build_report
from onegraph.debug.tlparse_report import TlparseReport
from tests.debug.written_trace import entries, entry, write_trace


@pytest.fixture(autouse=True)
def without_tlparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onegraph.debug.report.render_with_tlparse", lambda log, folder: TlparseReport(None, "off"))


def failed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["trace", *words]) == 1
    told = capsys.readouterr()
    assert "[OG-TRACE]" in told.err and "unexpected" not in told.err and not told.out
    return told.err


@pytest.mark.parametrize("words", [["--from", "log"], ["--", "false"]])
def test_a_folder_with_other_things_is_left_as_it_is(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "log", entries(layers=1))
    (tmp_path / "site/pages").mkdir(parents=True)
    (tmp_path / "site/pages/mine.html").write_text("mine")
    told = failed(["--out", "site", *words], capsys)
    assert "other things in it, such as pages" in told and "where: site" in told
    assert [path.name for path in (tmp_path / "site").rglob("*")] == ["pages", "mine.html"]


def test_a_report_is_built_anew_in_its_folder(tmp_path: Path) -> None:
    log = write_trace(tmp_path / "log", entries(layers=2))
    build_report(tmp_path / "report", [log])
    before = {path.name for path in (tmp_path / "report/pages").iterdir()}
    build_report(tmp_path / "report", [write_trace(tmp_path / "log", entries(layers=1))])
    assert {path.name for path in (tmp_path / "report/pages").iterdir()} < before


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/onegraph"])
def test_a_place_that_takes_no_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    write_trace(tmp_path / "log", entries(layers=1))
    for words in (["--from", "log"], ["--", "touch", "ran"]):
        assert "--out" in failed(["--out", place, *words], capsys)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["nowhere", "empty", "text.py"])
def test_what_is_no_trace_is_said_by_its_name(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.py").write_text("print(1)\n")
    assert f"where: {source}" in failed(["--from", source], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "text.py"]


def test_builds_of_one_process_have_a_report_each(tmp_path: Path) -> None:
    path = tmp_path / "dedicated_log_torch_trace_x.log"
    models = ["first", "second"]
    path.write_text("".join(entry("explain", {"model": model}, frame=number) for number, model in enumerate(models)))
    report = build_report(tmp_path / "report", [path])
    assert [one["model"] for one in report["processes"]] == models
    assert [one["folder"] for one in report["processes"]] == ["process-4242", "process-4242-2"]
    assert "2 builds of one process" in (tmp_path / "report/index.html").read_text()
    again = build_report(tmp_path / "again", [path], other=tmp_path / "report")
    assert [one["folder"] for one in again["compare"]] == ["process-4242", "process-4242-2"]
