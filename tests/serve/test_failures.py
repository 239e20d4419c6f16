"""Failures of the engine: requests in flight are answered with an error, and /health tells."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import openai
import pytest

from onegraph import LLM, SamplingParams
from onegraph.config.engine import EngineConfig
from onegraph.errors import ConfigError, ModelError
from onegraph.serve.server import Server
from onegraph.serve.settings import ServeSettings
from tests.compiled_parts import piece_callables
from tests.serve.live_server import live


def outcomes(client: openai.OpenAI, go: threading.Event, number: int = 6) -> list[Any]:
    """The errors, or texts, of requests that are in flight when `go` is set; half of them stream."""
    results: list[Any] = [None] * number
    begun = threading.Barrier(number + 1)

    def ask(at: int) -> None:
        begun.wait()
        try:
            answer = client.completions.create(
                model="tiny", prompt=f"request {at}", max_tokens=50, temperature=0, stream=bool(at % 2)
            )
            results[at] = "".join(c.choices[0].text for c in answer) if at % 2 else answer.choices[0].text
        except openai.APIError as error:
            results[at] = error

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(number)]
    for thread in threads:
        thread.start()
    begun.wait()
    threading.Timer(0.5, go.set).start()
    for thread in threads:
        thread.join(60)
    return results


def test_an_engine_that_fails_answers_all_and_shows_it(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with live(model_folder) as one:
        fail = threading.Event()

        def broken() -> Any:
            fail.wait(30)
            raise AssertionError("the scheduler's state is broken")

        monkeypatch.setattr(one.engine._scheduler, "schedule", broken)
        results = outcomes(one.openai, fail)
        assert all(isinstance(result, openai.APIError) for result in results)
        assert all("the engine failed: AssertionError" in str(result) for result in results)
        health = one.http.get("/health")
        assert health.status_code == 503 and health.json() == {"status": "failed"}
        assert one.http.get("/ready").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            one.openai.completions.create(model="tiny", prompt="a")
        assert caught.value.status_code == 503 and caught.value.code == "engine_failed"
        assert one.metrics()['onegraph_engine_state{state="failed"}'] == 1
    assert one.code == 1
    assert "the engine failed: AssertionError" in caplog.text


def test_a_batch_that_fails_costs_its_requests_and_nothing_else(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(model_folder) as one:
        run, fail = one.engine._run, threading.Event()

        def broken(batch: Any) -> Any:
            if fail.wait(30) and not hasattr(broken, "done"):
                broken.done = True  # type: ignore[attr-defined]
                raise RuntimeError("out of luck")
            return run(batch)

        monkeypatch.setattr(one.engine, "_run", broken)
        results = outcomes(one.openai, fail)
        failed = [result for result in results if isinstance(result, openai.APIError)]
        assert failed and all("the batch failed: RuntimeError" in str(error) for error in failed)
        assert all(isinstance(result, str | openai.APIError) for result in results)
        assert one.http.get("/health").status_code == 200
        assert one.openai.completions.create(model="tiny", prompt="a").choices[0].finish_reason == "length"
        assert one.is_empty()
    assert one.code == 0


def test_a_piece_that_raises_is_demoted_and_its_requests_are_finished(
    model_folder: Path, llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    """As an artifact would that the machine can't run: the server says so once, and answers as eager does."""
    expected = llm.generate("once upon", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text
    engine = {"enforce_eager": False, "compilation_config": {"backend": "aot_eager"}}
    with live(model_folder, engine=engine) as one:
        assert one.server.client.thread.started is not None
        compiled = one.server.client.thread.started.compiled

        def broken(inputs: list[Any]) -> Any:
            raise RuntimeError("an instruction that this machine hasn't")

        def ask() -> str:
            answer = one.openai.completions.create(model="tiny", prompt="once upon", max_tokens=20, temperature=0)
            return answer.choices[0].text

        assert ask() == expected
        piece_callables(compiled)[0][2] = broken
        assert [ask(), ask()] == [expected, expected]
        pieces = one.http.get("/explain").json()["pieces"]
        assert [piece["backend"] for piece in pieces if piece["kind"] == "compiled"] == [
            "aot_eager",
            "eager",
            "aot_eager",
        ]
        assert "an instruction that this machine hasn't" in pieces[2]["ranges"][0]["why"]
        assert one.http.get("/health").status_code == 200
        assert one.is_empty()
    assert caplog.text.count("piece 2 runs uncompiled from now on") == 1


@pytest.mark.parametrize(
    ("engine", "error"),
    [({"model": "/nowhere/model"}, ModelError), ({"max_model_len": 10**6}, ConfigError)],
    ids=["no model", "too long"],
)
def test_a_start_that_fails_raises_what_it_failed_with(
    engine: dict[str, Any], error: type[Exception], model_folder: Path
) -> None:
    config = EngineConfig(**{"model": str(model_folder), "enforce_eager": True, **engine})
    server = Server(config, ServeSettings(port=0))
    with pytest.raises(error):
        server.serve()
    assert not server.client.thread.is_alive


def test_an_unexpected_error_of_the_server_is_a_500_without_its_message(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with live(model_folder) as one:

        def broken(*_: Any, **__: Any) -> Any:
            raise ZeroDivisionError("secret words")

        monkeypatch.setattr(one.server.client, "submit", broken)
        with pytest.raises(openai.InternalServerError, match="unexpected ZeroDivisionError"):
            one.openai.completions.create(model="tiny", prompt="a")
    assert "unexpected ZeroDivisionError at" in caplog.text and "secret words" not in caplog.text
