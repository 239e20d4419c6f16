"""The reports of a server's cold and warm start, of the 135M Llama shape, opened in Chromium. `scripts/test --full`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.models import make_model
from tests.debug.browser import Browser, chromium
from tests.serve.live_server import wait_until

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


def traced_server(model: Path, folder: Path, name: str, *words: str) -> None:
    """Serves until one completion is there and ends it with Ctrl-C, under `onegraph trace`."""
    log = folder / f"{name}.log"
    program = [sys.executable, "-m", "onegraph.cli.main"]
    serve = [*program, "serve", str(model), "--port", "0", "--num-kv-blocks", "256"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*program, "trace", "--out", name, *words, "--", *serve],
            cwd=folder,
            stdout=file,
            stderr=file,
            env={**os.environ, "ONEGRAPH_CACHE_ROOT": str(folder / "cache")},
        )
    try:
        wait_until(lambda: "/v1 after" in log.read_text() or process.poll() is not None, 300)
        url = re.findall(r"at (http://\S+?),", log.read_text())[0]
        body = {"prompt": "def ", "max_tokens": 12}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(180) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    model = make_model("135m", folder / "llama-135m")
    traced_server(model, folder, "cold")
    traced_server(model, folder, "warm", "--compare", "cold")
    return folder


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_the_report_of_a_server(folder: Path, browser: Browser, start: str) -> None:
    pages = browser.crawl(folder / start / "index.html")
    assert "piece-2.html" in {page.name for page in pages}
    assert len(pages) < 20  # 61 pieces, of which three are compiled
    facts: dict[str, Any] = json.loads((folder / start / "facts.json").read_text())
    (process,) = facts["processes"]
    assert facts["run"]["exit_code"] == 0
    assert process["start"] == start
    assert process["problems"] == []
    assert sum(len(group["indices"]) for group in process["pieces"]) == 61
    assert (folder / start / "tlparse" / f"process-{process['pid']}" / "index.html").is_file()
    if start == "warm":
        (differences,) = facts["compare"]
        assert differences["topics"]["constraints"] == []
        assert {"name": "start", "was": "cold", "is": "warm", "why": ""} in differences["topics"]["store"]
