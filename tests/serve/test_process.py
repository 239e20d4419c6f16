"""`onegraph serve` as a process: signals, exit codes, traces, addresses, and what it says."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from onegraph import LLM, SamplingParams
from onegraph.cli.main import main
from onegraph.errors import ConfigError
from onegraph.serve.settings import ServeSettings
from tests.serve.live_server import Process, process, wait_until
from tests.traces import entries, rendered

FLAGS = ["--port=0", "--dtype=float32", "--enforce-eager", "--num-kv-blocks=256", "--served-model-name=tiny"]


def client_of(one: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_term_under_load_loses_no_answer_and_exits_with_0(model_folder: Path, tmp_path: Path, llm: LLM) -> None:
    prompts = [f"request {number}" for number in range(16)]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    expected = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    answers: dict[int, str] = {}
    refused: list[Exception] = []
    began = threading.Event()
    with (
        process([str(model_folder), *FLAGS, "--max-num-seqs=4"], tmp_path) as one,
        client_of(one.wait_ready()) as client,
    ):

        def ask(number: int, stream: bool) -> None:
            answer = client.completions.create(
                model="tiny",
                prompt=prompts[number],
                max_tokens=100,
                temperature=0,
                stream=stream,
                extra_body={"ignore_eos": True},
            )
            if stream:
                text = ""
                for chunk in answer:
                    began.set()
                    text += chunk.choices[0].text
                answers[number] = text
            else:
                answers[number] = answer.choices[0].text

        def ask_late() -> None:
            try:
                client.completions.create(model="tiny", prompt="late")
            except openai.APIError as error:
                refused.append(error)

        threads = [threading.Thread(target=ask, args=(n, n % 2 == 0)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        assert began.wait(60)
        with httpx.Client(base_url=one.url) as http:
            wait_until(lambda: http.get("/metrics").text.count("onegraph_requests_waiting 12") or answers)
        one.signal(signal.SIGTERM)
        wait_until(lambda: "draining" in one.log.read_text())
        ask_late()
        for thread in threads:
            thread.join(120)
        assert one.wait() == 0, one.log.read_text()
    assert [answers[number] for number in range(len(prompts))] == expected
    assert len(refused) == 1
    assert "16 requests in flight" in one.log.read_text() or "Traceback" not in one.log.read_text()


def test_a_second_signal_ends_at_once(model_folder: Path, tmp_path: Path) -> None:
    with process([str(model_folder), *FLAGS, "--block-size=1"], tmp_path) as one, client_of(one.wait_ready()) as client:
        body = {"ignore_eos": True}
        stream = client.completions.create(
            model="tiny", prompt="a", n=120, max_tokens=120, stream=True, extra_body=body
        )
        next(iter(stream))
        one.signal(signal.SIGINT)
        wait_until(lambda: "draining" in one.log.read_text())
        began = time.monotonic()
        one.signal(signal.SIGINT)
        assert one.wait(20) == 1
        assert time.monotonic() - began < 15
        stream.close()
    assert "Traceback" not in one.log.read_text()


def test_a_drain_that_takes_too_long_ends_requests_with_an_error(model_folder: Path, tmp_path: Path) -> None:
    words = [str(model_folder), *FLAGS, "--drain-timeout-s=0.2", "--max-num-seqs=1"]
    with process(words, tmp_path) as one, client_of(one.wait_ready()) as client:
        body = {"ignore_eos": True}
        stream = client.completions.create(
            model="tiny", prompt="a", n=120, max_tokens=120, stream=True, extra_body=body
        )
        next(iter(stream))
        one.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert one.wait(30) == 0


def test_a_signal_while_it_loads(tmp_path: Path) -> None:
    """The built-in model is compiled for seconds, which nothing can interrupt: the process ends all the same."""
    with process(["--port=0"], tmp_path, ONEGRAPH_CACHE_ROOT=str(tmp_path / "cache")) as one:
        url = one.url
        with httpx.Client(base_url=url) as http:
            wait_until(lambda: http.get("/health").status_code == 503)
        one.signal(signal.SIGTERM)
        assert one.wait(30) == 0
    assert "ready" not in one.log.read_text() and "Traceback" not in one.log.read_text()


def test_traces_are_whole_after_ctrl_c(tmp_path: Path) -> None:
    """`TORCH_TRACE=dir onegraph serve`, Ctrl-C, `tlparse dir/<first file>`: a cold start, then a warm one."""
    recorded = ["-O.cudagraph_mode=FULL_DECODE_ONLY", "-O.cudagraph_capture_sizes=[1]", "-O.cudagraph_lazy=true"]
    words = ["--port=0", "--num-kv-blocks=512", "-O.backend=eager", *recorded]
    for start, index in ("cold", "miss"), ("warm", "hit"):
        traced = process(words, tmp_path, TORCH_TRACE=str(tmp_path / start))
        with traced as one, client_of(one.wait_ready()) as client:
            assert client.completions.create(model="builtin", prompt="def ", max_tokens=4).choices[0].text
            one.signal(signal.SIGINT)
            assert one.wait() == 0, one.log.read_text()
        (log,) = (tmp_path / start).iterdir()
        report, found = rendered(log, tmp_path / f"{start}-report"), entries(log)
        assert {f"onegraph_{name}" for name in found} <= report.keys()
        assert found["store"]["index"]["status"] == index and ("ledger_evaluation" in found) == (start == "warm")
        assert found["recordings"]["sizes"] == found["explain"]["plan"]["sizes"] != []  # made while it served
        timeline = found["timeline"]
        imported = [event["detail"] for event in timeline["events"] if event["name"] == "import"]
        assert imported[:4] == ["before onegraph", "torch", "transformers", "onegraph.serve.server"]
        assert 0 < timeline["ready_s"] < timeline["first_token_s"]  # that of a request, not of the rehearsal


def test_a_port_that_is_taken_is_one_readable_block(tmp_path: Path, model_folder: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        process(["--port", str(taken.getsockname()[1])], tmp_path) as one,
    ):
        assert one.wait() == 1
    told = one.log.read_text()
    assert "[OG-SERVE] can't listen on 127.0.0.1" in told and "Address already in use" in told
    assert "Traceback" not in told and len(told.splitlines()) == 3


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with process(["/nowhere/model", "--port=0"], tmp_path) as one:
        assert one.wait() == 1
    told = one.log.read_text()
    assert "/nowhere/model" in told and "[OG-MODEL]" in told and "Traceback" not in told


def test_events_as_json(model_folder: Path, tmp_path: Path) -> None:
    with process([str(model_folder), *FLAGS, "--json"], tmp_path) as one:

        def events() -> list[dict[str, object]]:
            return [json.loads(line) for line in one.log.read_text().splitlines()]

        wait_until(lambda: any(event["event"] == "ready" for event in events()))
        url = str(events()[0]["url"])
        assert httpx.get(f"{url}/ready").status_code == 200
        one.signal(signal.SIGINT)
        assert one.wait() == 0
        assert [event["event"] for event in events()] == ["listening", "ready", "draining"]
        assert events()[0]["models"] == ["tiny"]


def test_it_listens_on_this_machine_alone_unless_asked(model_folder: Path, tmp_path: Path) -> None:
    assert ServeSettings().host == "127.0.0.1"
    with process([str(model_folder), *FLAGS], tmp_path) as one:
        port = int(one.wait_ready().url.rpartition(":")[2])
        listening = re.findall(
            rf"^ *\d+: ([0-9A-F]+):{port:04X} 00000000:0000 0A", Path("/proc/net/tcp").read_text(), re.M
        )
        assert listening == ["0100007F"]
        one.signal(signal.SIGTERM)
        assert one.wait() == 0


WITHOUT_EXTRA = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
def find_no_extras(name, path=None, target=None):
    return None if name.split(".")[0] in {"fastapi", "uvicorn", "pydantic"} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_no_extras
from onegraph.cli.main import main
sys.exit(main(["serve", "--port=0"]))
"""


def test_without_the_extra_it_says_what_to_install() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTRA], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "[OG-SERVE] the server's packages are missing" in result.stderr
    assert "pip install 'onegraph[serve]'" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "word",
    [
        "--port=70000",
        "--port=x",
        "--max-queue=-1",
        "--request-timeout-s=0",
        "--api-key=",
        "--max-n=0",
        "--host=",
        "--drain-timeout-s=nan",
    ],
)
def test_a_value_that_makes_no_sense_is_bad_usage(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", word]) == 2
    assert word.split("=")[0].removeprefix("--").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


def test_settings_are_checked_in_python_too() -> None:
    for wrong in ({"max_queue": True}, {"max_body_bytes": 0}, {"api_key": ("",)}, {"drain_timeout_s": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ServeSettings(**wrong)  # type: ignore[arg-type]
