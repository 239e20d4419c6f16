"""Servers for tests: the tiny model behind a real socket, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai

from onegraph.config.engine import EngineConfig
from onegraph.engine.engine import Engine
from onegraph.serve.server import Server
from onegraph.serve.settings import ServeSettings

ROOT = Path(__file__).parents[2]


class Live:
    """A server in a thread of this process, with a client for it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.url = server.url
        self.http = httpx.Client(base_url=server.url, timeout=60)
        key = server._settings.api_key[0] if server._settings.api_key else "none"
        self.openai = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)
        self.code: int | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self.code = self.server.serve()

    def wait_ready(self) -> Live:
        wait_until(lambda: self.http.get("/ready").status_code == 200)
        return self

    @property
    def engine(self) -> Engine:
        assert self.server.client.thread.started is not None
        return self.server.client.thread.started.engine

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def is_empty(self) -> bool:
        """Whether nothing runs or waits, and every block is free."""
        metrics = self.metrics()
        names = ("requests_running", "requests_waiting", "kv_blocks_used")
        return all(metrics[f"onegraph_{name}"] == 0 for name in names)

    def close(self) -> None:
        self.server.stop()
        self._thread.join(60)
        self.http.close()
        self.openai.close()
        assert not self._thread.is_alive()
        assert not self.server.client.thread.is_alive


def wait_until(condition: Any, timeout_s: float = 60) -> None:
    """Polls until it holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it didn't come about in time"
        time.sleep(0.02)


@contextlib.contextmanager
def live(model: Any, *, engine: dict[str, Any] | None = None, ready: bool = True, **settings: Any) -> Iterator[Live]:
    """A server of the model while the block runs; it has to end with exit code 0."""
    config = EngineConfig(
        model=str(model), **{"dtype": "float32", "enforce_eager": True, "num_kv_blocks": 256, **(engine or {})}
    )
    served = {"served_model_name": ("tiny",), **settings}
    one = Live(Server(config, ServeSettings(port=0, **served)))
    try:
        yield one.wait_ready() if ready else one
    finally:
        one.close()


class Process:
    """`onegraph serve` as a person starts it."""

    def __init__(self, words: list[str], folder: Path, **variables: str) -> None:
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "onegraph.cli.main", "serve", *words],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables},
            )

    @property
    def url(self) -> str:
        """Where it listens, by its first line."""
        found: list[str] = []

        def told() -> bool:
            found[:] = re.findall(r"at (http://\S+?),", self.log.read_text())
            return bool(found) or self.process.poll() is not None

        wait_until(told, 120)
        assert found, self.log.read_text()
        return found[0]

    def wait_ready(self) -> Process:
        url = self.url
        with httpx.Client() as http:
            wait_until(lambda: http.get(f"{url}/ready").status_code == 200, 300)
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 120) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


@contextlib.contextmanager
def process(words: list[str], folder: Path, **variables: str) -> Iterator[Process]:
    """A server process, which is ended with the block."""
    one = Process(words, folder, **variables)
    try:
        yield one
    finally:
        one.close()
