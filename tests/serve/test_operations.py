"""Probes, keys, limits, metrics and the rest that people who run a server use."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import onegraph
from onegraph.counters import counters
from onegraph.engine.outputs import RequestOutput
from tests.serve.live_server import Live, live, wait_until


class Gate:
    """Holds an engine before its next step, so that what it is given stays in flight."""

    def __init__(self, one: Live, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        step = one.engine.try_step

        def held() -> Any:
            self.open.wait(30)
            return step()

        monkeypatch.setattr(one.engine, "try_step", held)


def post(one: Live, **fields: Any) -> httpx.Response:
    return one.http.post("/v1/completions", json={"prompt": "hello", "temperature": 0, "max_tokens": 4, **fields})


def in_thread(one: Live, answers: list[httpx.Response], **fields: Any) -> threading.Thread:
    """Sends a request that is answered later."""
    thread = threading.Thread(target=lambda: answers.append(post(one, **fields)))
    thread.start()
    return thread


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").to_dict()["max_model_len"] == 128
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_probes_version_and_explain(server: Live) -> None:
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.get("/ready").json() == {"status": "ready"}
    assert server.http.get("/version").json() == {"version": onegraph.__version__}
    facts = server.http.get("/explain").json()
    assert facts["config"]["mode"] == {"value": "NONE", "why": "enforce_eager"}
    assert facts == server.server.client.started.compiled.explain().to_dict()


def test_before_it_is_ready_only_probes_are_answered(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onegraph.serve import engine_client

    start, load = engine_client.start_engine, threading.Event()

    def slow(config: Any) -> Any:
        load.wait(30)
        return start(config)

    monkeypatch.setattr(engine_client, "start_engine", slow)
    with live(model_folder, ready=False) as one:
        assert one.http.get("/health").status_code == 503
        assert one.http.get("/ready").status_code == 503
        assert one.http.get("/explain").status_code == 503
        refused = post(one)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "engine_starting"
        assert one.http.get("/v1/models").json()["data"][0]["max_model_len"] is None
        assert 'onegraph_engine_state{state="starting"} 1.0' in one.http.get("/metrics").text
        load.set()
        one.wait_ready()
        assert post(one).status_code == 200
    assert one.code == 0


def test_nothing_compiles_once_it_is_ready(model_folder: Path) -> None:
    names = ("dynamo_compiles", "graphs_captured", "aot_compiles", "inductor_compiles", "gxx_runs", "recaptures")
    engine = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    with live(model_folder, engine=engine) as one, counters.expect(**dict.fromkeys(names, 0)):
        assert one.http.get("/explain").json()["pieces"]
        for prompt in ("a", ["hello", "x" * 50], "y" * 120):
            assert post(one, prompt=prompt).status_code == 200


def test_api_keys(model_folder: Path) -> None:
    with live(model_folder, api_key=("one", "two")) as one:
        for path in ("/v1/models", "/v1/models/tiny", "/explain", "/profile", "/v1/nothing"):
            for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "one"}):
                refused = one.http.get(path, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
        for key in ("one", "two"):
            for path in ("/v1/models", "/explain"):
                assert one.http.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert one.http.get(path).status_code == 200
        assert post(one).status_code == 401
        assert one.openai.completions.create(model="tiny", prompt="a").choices
        wrong = openai.OpenAI(base_url=f"{one.url}/v1", api_key="three", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_keys_are_compared_in_constant_time(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onegraph.serve import access

    compared: list[Any] = []
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    with live(model_folder, api_key=("one", "two")) as one:
        assert one.http.get("/v1/models", headers={"Authorization": "Bearer one"}).status_code == 200
    assert [expected for _, expected in compared] == [b"Bearer one", b"Bearer two"]


def test_several_served_names(model_folder: Path) -> None:
    with live(model_folder, served_model_name=("a/b", "c")) as one:
        assert [model["id"] for model in one.http.get("/v1/models").json()["data"]] == ["a/b", "c"]
        assert one.http.get("/v1/models/a/b").json()["id"] == "a/b"
        assert [post(one, model=name).json()["model"] for name in ("a/b", "c", None)] == ["a/b", "c", "a/b"]
        assert post(one, model="tiny").status_code == 404


def test_a_full_queue(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[httpx.Response] = []
    with live(model_folder, engine={"max_num_seqs": 1}, max_queue=2) as one:
        gate = Gate(one, monkeypatch)
        threads = [in_thread(one, answers), in_thread(one, answers, n=2)]
        wait_until(lambda: one.server.client.num_requests == 2)
        for fields in ({}, {"stream": True}, {"n": 2}):
            refused = post(one, **fields)
            assert refused.status_code == 429 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            one.openai.completions.create(model="tiny", prompt="a")
        too_many = post(one, n=4)  # never fits, so trying again is no use
        assert too_many.status_code == 400 and too_many.json()["error"]["param"] == "n"
        many_prompts = post(one, prompt=["a"] * 4)
        assert many_prompts.status_code == 400 and many_prompts.json()["error"]["param"] == "prompt"
        gate.open.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert post(one).status_code == 200
        assert one.metrics()['onegraph_errors_total{endpoint="/v1/completions",status="429"}'] == 4


def test_a_body_that_is_too_large(model_folder: Path) -> None:
    with live(model_folder, max_body_bytes=1000) as one:
        assert post(one, prompt="a" * 100).status_code == 200
        body = b'{"prompt": "%s"}' % (b"a" * 1000)
        headers = {"Content-Type": "application/json"}
        declared = one.http.post("/v1/completions", content=body, headers=headers)
        chunked = one.http.post("/v1/completions", content=iter([body[:600], body[600:]]), headers=headers)
        for refused in (declared, chunked):
            assert refused.status_code == 413 and "1000 bytes" in refused.json()["error"]["message"]


def test_a_body_that_does_not_come(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onegraph.serve import access

    monkeypatch.setattr(access, "BODY_TIMEOUT_S", 0.2)

    def slowly() -> Any:
        yield b'{"prompt":'
        time.sleep(1.0)
        yield b'"a"}'

    with live(model_folder) as one:
        answer = one.http.post("/v1/completions", content=slowly(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 408
        assert post(one).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(stream: bool, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(model_folder, request_timeout_s=0.3) as one:
        gate = Gate(one, monkeypatch)
        if stream:
            with pytest.raises(openai.APIError, match="request-timeout-s") as caught:
                list(one.openai.completions.create(model="tiny", prompt="a", stream=True))
            assert caught.value.code == "timeout"
        else:
            answer = post(one)
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        gate.open.set()
        wait_until(one.is_empty)


def test_metrics_count_what_happened(model_folder: Path) -> None:
    with live(model_folder, engine={"max_num_seqs": 2}) as one:
        before = counters.snapshot()
        counters.add("eager_batches:OG-RANGE", 3)
        prompt = "a prompt that is longer than a block of the cache"
        post(one, prompt=prompt, max_tokens=5, ignore_eos=True)
        list(one.openai.completions.create(model="tiny", prompt=prompt, max_tokens=4, stream=True, temperature=0))
        post(one, n=0)
        found = one.metrics()
    assert found["onegraph_prompt_tokens_total"] == 2 * len(prompt)
    assert found["onegraph_generated_tokens_total"] == 9
    assert found["onegraph_prefix_cache_hit_tokens_total"] == 48
    assert found['onegraph_requests_total{endpoint="/v1/completions",finish_reason="length"}'] == 2
    assert found['onegraph_errors_total{endpoint="/v1/completions",status="400"}'] == 1
    assert found["onegraph_time_to_first_token_seconds_count"] == 2
    assert found["onegraph_inter_token_latency_seconds_count"] == 3  # of the stream
    assert found["onegraph_time_per_output_token_seconds_count"] == 2
    assert found["onegraph_e2e_request_latency_seconds_count"] == 2
    assert 0 < found["onegraph_time_to_first_token_seconds_sum"] < found["onegraph_e2e_request_latency_seconds_sum"]
    assert found["onegraph_kv_blocks"] == 256 and found["onegraph_kv_cache_usage_ratio"] == 0
    assert found['onegraph_compile_state{start="eager"}'] == 1
    batches = before.get("eager_batches:OG-RANGE", 0) + 3
    assert found['onegraph_events_total{event="eager_batches",reason="OG-RANGE"}'] == batches


def test_recordings_are_counted_with_their_reasons(model_folder: Path) -> None:
    config = {"backend": "eager", "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1]}
    with live(model_folder, engine={"enforce_eager": False, "compilation_config": config}) as one:
        before = one.metrics()
        post(one, prompt=[1, 2, 3], max_tokens=5, ignore_eos=True).raise_for_status()
        after = one.metrics()
        plan = one.http.get("/explain").json()["plan"]
    grown = {name: after[name] - before.get(name, 0) for name in after if name.startswith("onegraph_events_total")}
    assert grown['onegraph_events_total{event="batches",reason="FULL:exact"}'] == 4
    assert grown['onegraph_events_total{event="batches",reason="NONE:not_uniform_decode"}'] == 1
    assert grown['onegraph_events_total{event="replays",reason="FULL"}'] == 4
    assert grown['onegraph_events_total{event="unrecorded_calls",reason="size_not_recorded"}'] == 1
    assert [(one["num_tokens"], one["mode"]) for one in plan["sizes"]] == [(1, "FULL")]


def test_metrics_show_what_runs_and_waits(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[httpx.Response] = []
    with live(model_folder, engine={"max_num_seqs": 1}) as one:
        step, seen = one.engine.try_step, threading.Event()
        go_on = threading.Event()

        def slow() -> Any:
            result = step()
            seen.set()
            go_on.wait(30)
            return result

        monkeypatch.setattr(one.engine, "try_step", slow)
        threads = [in_thread(one, answers, ignore_eos=True, n=3)]
        assert seen.wait(30)
        found = one.metrics()
        assert (found["onegraph_requests_running"], found["onegraph_requests_waiting"]) == (1, 2)
        assert found["onegraph_kv_blocks_used"] == 1 and found["onegraph_kv_cache_usage_ratio"] == 1 / 256
        go_on.set()
        for thread in threads:
            thread.join()
        assert one.is_empty()


def test_a_model_whose_numbers_break_costs_one_request(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that ends with an error of its own is answered with it; a neighbour isn't harmed."""
    with live(model_folder) as one:
        postprocess = one.engine._postprocess

        def broken(batch: Any, step: Any, sampled: Any) -> list[RequestOutput]:
            rows = [row for row, sequence in enumerate(step.sequences) if sequence.num_prompt_tokens == 3]
            return postprocess(batch, step, type(sampled)(sampled.token_ids, sampled.ranked, frozenset(rows)))

        monkeypatch.setattr(one.engine, "_postprocess", broken)
        answers: list[httpx.Response] = []
        threads = [in_thread(one, answers, prompt=prompt) for prompt in ("bad", "good", "also good")]
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 500]
        with pytest.raises(openai.APIError, match="no finite maximum"):
            list(one.openai.completions.create(model="tiny", prompt="bad", stream=True))
        assert one.is_empty() and one.http.get("/health").status_code == 200


def test_prompts_are_in_no_log(model_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    secret = "hunter2"
    caplog.set_level(logging.DEBUG)
    with live(model_folder) as one:
        post(one, prompt=secret)
        post(one, prompt=secret * 40)
        post(one, prompt=secret, temperature=secret)
        chat = {"messages": [{"role": secret, "content": secret}]}
        assert one.http.post("/v1/chat/completions", json=chat).status_code == 400

        def fail(batch: Any) -> Any:
            raise RuntimeError(secret)

        monkeypatch.setattr(one.engine, "_run", fail)
        assert post(one, prompt=secret).status_code == 500
    assert "a batch of 1 requests failed: RuntimeError" in caplog.text
    ours = [record for record in caplog.records if not record.name.startswith(("httpcore", "httpx", "openai"))]
    assert ours and not [record for record in ours if secret in record.getMessage() or record.exc_info]
