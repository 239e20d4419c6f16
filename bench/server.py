"""Server engines: a process that serves, one client for all of them, and the figures of each level.

Takes: the engine, a model and a `ServerWorkload`. Gives: seconds from the start of the process to ready (its own
word for it, a 200), and each level's figures; or why it failed. The client runs in this process.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.client import HOST, AnswerError, completion_body, get_status, read_answer, run_clients
from bench.figures import level_figures
from bench.processes import end_group, interpreter, reason, variables, without_paths
from bench.workloads import ServerWorkload

MODEL_NAME = "bench"
POLL_S = 0.1


@dataclass(frozen=True)
class ServerCommand:
    """What follows the interpreter, before the flags that all understand alike; and what answers 200 when ready."""

    words: tuple[str, ...]
    ready: str


ONEGRAPH = ("-m", "onegraph.cli.main", "serve", "{model}")
VLLM = ("-m", "vllm.entrypoints.cli.main", "serve", "{model}")
SERVERS = {
    # onegraph listens before it is ready, and /v1/models answers then; vLLM listens when it is
    "onegraph": ServerCommand(ONEGRAPH, "/ready"),
    "onegraph-unrecorded": ServerCommand((*ONEGRAPH, "-O.cudagraph_mode=NONE"), "/ready"),
    "onegraph-eager": ServerCommand((*ONEGRAPH, "--enforce-eager"), "/ready"),
    "vllm": ServerCommand(VLLM, "/v1/models"),
    "vllm-eager": ServerCommand((*VLLM, "--enforce-eager"), "/v1/models"),
}


def command(engine: str, python: str, model: Path, port: int) -> list[str]:
    """The command line of an engine's server."""
    words = [word.replace("{model}", str(model)) for word in SERVERS[engine].words]
    common = ["--host", HOST, "--port", str(port), "--served-model-name", MODEL_NAME, "--max-model-len", "1024"]
    return [python, *words, *common]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@contextmanager
def serving(words: list[str], environment: dict[str, str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process, in a group of its own, which ends with the block; its output goes to the file `log`."""
    process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        end_group(process)


async def wait_until_ready(process: subprocess.Popen[bytes], port: int, path: str, timeout_s: float) -> None:
    """Returns at the first 200. Raises AnswerError when the process ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    while await get_status(port, path) != 200:
        if process.poll() is not None:
            raise AnswerError(f"the server ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise AnswerError(f"timeout: not ready after {timeout_s:.0f} s")
        await asyncio.sleep(POLL_S)


async def measure_level(
    port: int, workload: ServerWorkload, level: int, vocab_size: int, cache: Path
) -> dict[str, Any]:
    """One unmeasured request for each client, then the measured ones. Raises AnswerError where those hold compiling."""
    unmeasured, measured = (
        [completion_body(MODEL_NAME, prompt, workload.output_len) for prompt in prompts]
        for prompts in workload.prompts(vocab_size, level)
    )
    await run_clients(port, unmeasured, level)
    before = num_kernels(cache)
    streams, seconds = await run_clients(port, measured, level)
    if compiled := num_kernels(cache) - before:
        raise AnswerError(f"compiled {compiled} kernels while the clock ran")
    return level_figures([read_answer(stream, workload.output_len) for stream in streams], seconds)


async def measure_levels(
    port: int, workload: ServerWorkload, vocab_size: int, cache: Path, timeout_s: float
) -> dict[str, Any]:
    """Each level's figures, or its failure; the levels after one that failed are still tried."""
    levels: dict[str, Any] = {}
    for level in workload.concurrency:
        try:
            measuring = measure_level(port, workload, level, vocab_size, cache)
            levels[str(level)] = await asyncio.wait_for(measuring, timeout_s)
        except TimeoutError:
            levels[str(level)] = {"failed": f"timeout: took longer than {timeout_s:.0f} s"}
        except (ExceptionGroup, AnswerError, EOFError, OSError, ValueError) as error:
            levels[str(level)] = {"failed": without_paths(_first(error))[:300]}
    return levels


def _first(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def num_kernels(cache: Path) -> int:
    """Compiled libraries in the compile caches: engines that compile while they serve add to them."""
    return sum(1 for _ in cache.rglob("*.so")) if cache.exists() else 0


def run_server(
    engine: str, model: Path, workload: ServerWorkload, cache: Path, timeout_s: float, vllm_python: Path | None
) -> dict[str, Any]:
    """One server process through all levels: `ready_s` and `levels`, or `failed`. `timeout_s` is for each of them."""
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    port = free_port()
    words = command(engine, interpreter(engine, vllm_python), model, port)
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryFile() as log:
        try:
            began = time.monotonic()
            with serving(words, variables(engine, cache, vllm_python), log) as process:
                asyncio.run(wait_until_ready(process, port, SERVERS[engine].ready, timeout_s))
                ready_s = time.monotonic() - began
                levels = asyncio.run(measure_levels(port, workload, vocab_size, cache, timeout_s))
        except AnswerError as error:
            log.seek(0)
            return {"failed": f"{error}: {reason(log.read().decode(errors='replace'))}"}
    return {"ready_s": ready_s, "levels": levels, "load_average_before": load}
