"""The report of a trace, opened in Chromium: links, widths, the dark, hostile names, the first screen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onegraph.debug.report import build_report
from tests.debug.browser import Browser, chromium
from tests.debug.written_trace import HOSTILE, entries, write_trace


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


def trace(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`onegraph trace`, with a cache of its own."""
    environment = {**os.environ, "ONEGRAPH_CACHE_ROOT": str(cwd / "cache"), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "onegraph.cli.main", "trace", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reports `cold` and `warm` of the built-in model, the second beside the first."""
    folder = tmp_path_factory.mktemp("built-in")
    words = ("--num-kv-blocks", "256", "--prompt", "def ", "--max-tokens", "4")
    for more in (("--out", "cold"), ("--out", "warm", "--compare", "cold")):
        done = trace(*words, *more, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(folder / more[1] / "index.html")
        assert "--- 'def '" in done.stdout  # the command's own output
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a warm start of 60 layers beside a cold one, with every entry, and hostile names in them."""
    folder = tmp_path_factory.mktemp("decoder")
    for name, warm in (("cold", False), ("warm", True)):
        other = folder / "cold" if warm else None
        build_report(folder / name, [write_trace(folder / name / "trace", entries(warm=warm))], other=other)
    return folder / "warm"


def facts(folder: Path) -> dict[str, Any]:
    (process,) = json.loads((folder / "facts.json").read_text())["processes"]
    return process


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_the_report_of_a_real_run(built_in: Path, browser: Browser, start: str) -> None:
    pages = browser.crawl(built_in / start / "index.html")
    assert {page.name for page in pages} >= {"index.html", "captured_graph.html", "execution_plan.html", "piece-2.html"}
    browser.show(built_in / start / "index.html")
    header = browser.script("return document.querySelector('header').innerText")
    assert f"{start} start" in header
    assert "exit code 0" in header
    found = facts(built_in / start)
    assert found["start"] == start
    assert found["problems"] == []
    assert found["texts"]["piece_2_output_code"]["lines"] > 10
    assert (built_in / start / "tlparse" / f"process-{found['pid']}" / "index.html").is_file()
    code = (built_in / start / "pages/piece-2.html").read_text()
    assert "= kernels[&#39;kernel_" in code


def test_a_warm_start_beside_a_cold_one(built_in: Path) -> None:
    (differences,) = json.loads((built_in / "warm/facts.json").read_text())["compare"]
    topics = differences["topics"]
    assert topics["versions"] == topics["config"] == topics["constraints"] == []
    assert {"name": "start", "was": "cold", "is": "warm", "why": ""} in topics["store"]
    assert topics["time"]


def test_a_decoder_of_sixty_layers(decoder: Path, browser: Browser) -> None:
    pages = browser.crawl(decoder / "index.html")
    assert len(pages) == 1 + 3 + 4, pages  # the index, three graphs, and four pieces that differ
    browser.show(decoder / "index.html")
    assert browser.script("return document.querySelectorAll('#pieces table:first-of-type')[0].rows.length") == 5
    assert browser.script("return document.body.scrollHeight") < 20 * 800


def test_hostile_names_stay_text(decoder: Path, browser: Browser) -> None:
    for page in (decoder / "index.html", decoder / "pages/piece-2.html", decoder / "pages/captured_graph.html"):
        browser.show(page)
        assert browser.script("return document.title") != "owned"
        assert browser.script("return document.images.length + document.querySelectorAll('[onerror]').length") == 0
        assert HOSTILE not in page.read_text()
        assert browser.problems() == []
    assert (
        "owned" in browser.script("return document.body.textContent") or "owned" in (decoder / "index.html").read_text()
    )


def test_nothing_of_a_trace_is_run_even_if_it_were_not_escaped(decoder: Path, browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_text((decoder / "index.html").read_text().replace("<nav", f"{HOSTILE}<nav"))
    browser.show(page)
    assert browser.script("return document.title") != "owned"
    assert any("Content Security Policy" in problem for problem in browser.problems())


def test_it_follows_the_colours_of_the_system(decoder: Path, browser: Browser) -> None:
    def lightness() -> tuple[float, float]:
        numbers = browser.script(
            "const of = getComputedStyle(document.body); return [of.backgroundColor, of.color].map("
            "(one) => one.match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765)"
        )
        return numbers[0], numbers[1]

    browser.show(decoder / "index.html")
    page, ink = lightness()
    assert page > 0.9 and ink < 0.2
    browser.show(decoder / "index.html", dark=True)
    page, ink = lightness()
    assert page < 0.2 and ink > 0.8


def test_the_flame_picture_widens_by_click_and_key(decoder: Path, browser: Browser) -> None:
    browser.show(decoder / "index.html")
    names = browser.script("return [...document.querySelectorAll('.frame text')].map((one) => one.textContent)")
    assert {"step", "model", "piece 0 (model.layers.0)", "piece 1 × 60", "piece 2 × 59", "detokenise"} <= set(names)
    frame = "[...document.querySelectorAll('.frame')].find((one) => one.textContent.includes('detokenise'))"
    width = (
        f"return {frame}.getBoundingClientRect().width / document.querySelector('.flame').getBoundingClientRect().width"
    )
    before = browser.script(width)
    assert before < 0.1
    browser.script(f"{frame}.dispatchEvent(new MouseEvent('click'))")
    assert browser.script(width) == pytest.approx(1, abs=0.01)
    assert "ms a step" in browser.script("return document.getElementById('told').textContent")
    browser.script(f"{frame}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Escape'}}))")
    assert browser.script(width) == pytest.approx(before, abs=0.01)
    assert browser.problems() == []


def test_all_that_is_clicked_is_reached_by_keys(decoder: Path, browser: Browser) -> None:
    browser.show(decoder / "index.html")
    unreachable = browser.script(
        "return [...document.querySelectorAll('a, summary, input, .box, .frame[tabindex]')]"
        ".filter((one) => one.tabIndex < 0).length"
    )
    assert unreachable == 0
    filtered = "return [...document.querySelectorAll('#state tbody tr')].filter((row) => !row.hidden).length"
    assert browser.script(filtered) == 360
    browser.script(
        "const input = document.querySelector('input[data-rows=state]'); input.value = 'layers.17.';"
        "input.dispatchEvent(new Event('input'))"
    )
    assert browser.script(filtered) == 1


def test_several_processes_have_a_front_page(tmp_path: Path, browser: Browser) -> None:
    logs = [write_trace(tmp_path / "trace", entries(layers=2, warm=pid == 2), pid=pid) for pid in (1, 2)]
    build_report(tmp_path, logs)
    pages = browser.crawl(tmp_path / "index.html")
    assert {page.relative_to(tmp_path.resolve()).parts[0] for page in pages} == {"index.html", "process-1", "process-2"}
    browser.show(tmp_path / "index.html")
    assert "2 processes" in browser.script("return document.body.innerText")


def test_a_trace_of_nothing_of_ours(tmp_path: Path, browser: Browser) -> None:
    build_report(tmp_path, [write_trace(tmp_path / "trace", {})])
    assert len(browser.crawl(tmp_path / "index.html")) == 1


PLANTED = """
import torch
from torch.export import Dim

import onegraph


class Model(torch.nn.Module):
    def forward(self, x):
        if x.shape[0] % 128 == 0:  # planted
            return x + 1
        return x - 1


compiled = onegraph.compile(Model(), dynamic_shapes={"x": {0: Dim("num_tokens", min=1, max=1024)}})
compiled(torch.ones(128, 4))
"""


def test_a_planted_branch_is_on_the_first_screen(tmp_path: Path, browser: Browser) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = trace("--out", "report", "--", sys.executable, "planted.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "[OG-CONSTRAINT]" in done.stderr
    for width, height in ((1280, 800), (360, 740)):
        browser.show(tmp_path / "report/index.html", width=width, height=height)
        place = browser.script(
            "const found = document.querySelector('.notice.bad'); const box = found.getBoundingClientRect();"
            "return [found.innerText, box.top, box.bottom, window.innerHeight]"
        )
        text, top, bottom, screen = place
        assert "128" in text and "num_tokens" in text
        assert "planted.py:10" in text
        assert top >= 0 and bottom <= screen


def test_without_tlparse_the_report_says_how_to_get_it(
    tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onegraph.debug.tlparse_report._tlparse", lambda: None)
    build_report(tmp_path, [write_trace(tmp_path / "trace", entries(layers=2))])
    browser.crawl(tmp_path / "index.html")
    browser.show(tmp_path / "index.html")
    assert "pip install 'onegraph[debug]'" in browser.script("return document.getElementById('raw').innerText")
    assert not shutil.which("tlparse", path=str(tmp_path))
