"""/profile of a server that has real requests: what it gives, and who is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

from tests.serve.live_server import Live, live, wait_until


@pytest.fixture
def one(server: Live) -> Live:
    wait_until(server.is_empty)
    return server


class Asking:
    """A request that is answered later."""

    def __init__(self, one: Live, path: str, **fields: Any) -> None:
        self._answer: httpx.Response | None = None
        method = "POST" if fields else "GET"

        def ask() -> None:
            self._answer = httpx.request(method, f"{one.url}{path}", json=fields or None, timeout=60)

        self._thread = threading.Thread(target=ask)
        self._thread.start()

    def answer(self) -> httpx.Response:
        self._thread.join(60)
        assert self._answer is not None
        return self._answer


def is_profiled(one: Live) -> bool:
    return one.server.client.thread._profiling is not None


def complete(one: Live, **fields: Any) -> httpx.Response:
    body = {"prompt": "hello", "temperature": 0, "max_tokens": 30, "ignore_eos": True, **fields}
    return one.http.post("/v1/completions", json=body)


def test_it_profiles_the_next_steps_of_requests_whose_tokens_stay_the_same(one: Live) -> None:
    expected = complete(one).json()["choices"][0]["text"]
    asking = Asking(one, "/profile?steps=10")
    wait_until(lambda: is_profiled(one))
    assert complete(one).json()["choices"][0]["text"] == expected
    answer = asking.answer()
    assert answer.status_code == 200, answer.text
    facts = answer.json()
    assert facts["steps"] == 10
    assert sum(batch["count"] for batch in facts["batches"]) == 10
    assert facts["batches"][0]["kind"] == "prefill"
    seconds = {tuple(row["path"]): row["seconds_per_step"] for row in facts["rows"]}
    parts = {path[1] for path in seconds if len(path) == 2}
    assert parts == {"scheduler", "input preparation", "model", "sampling", "outputs", "hand over"}
    assert sum(value for path, value in seconds.items() if len(path) == 2) <= seconds["step",] * 1.01
    assert facts["seconds_per_step"] == pytest.approx(seconds["step",])
    assert complete(one).json()["choices"][0]["text"] == expected
    engine = one.engine
    assert not {"_prepare", "_forward", "schedule"} & {*vars(engine._runner), *vars(engine._scheduler)}


def test_a_timeline_and_a_picture(one: Live) -> None:
    for form in ("perfetto", "svg"):
        asking = Asking(one, f"/profile?steps=5&format={form}")
        wait_until(lambda: is_profiled(one))
        complete(one)
        answer = asking.answer()
        assert answer.status_code == 200, answer.text
        if form == "svg":
            assert answer.headers["content-type"] == "image/svg+xml"
            assert ElementTree.fromstring(answer.text).tag.endswith("svg")
        else:
            spans = [event for event in answer.json()["traceEvents"] if event["ph"] == "X"]
            assert sum(event["name"] == "step" for event in spans) == 5


def test_no_traffic_is_an_error_that_says_what_to_do(one: Live) -> None:
    answer = one.http.get("/profile?timeout_s=0.05")
    assert answer.status_code == 408
    error = answer.json()["error"]
    assert error["code"] == "no_traffic" and "send some" in error["message"]
    assert not is_profiled(one)


def test_fewer_steps_than_asked_for_are_told(one: Live) -> None:
    asking = Asking(one, "/profile?steps=1000&timeout_s=1.5")
    wait_until(lambda: is_profiled(one))
    complete(one, max_tokens=5)
    facts = asking.answer().json()
    assert 0 < facts["steps"] < 1000
    assert "ended early: 1000 steps were asked for" in facts["notes"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("steps=0", "steps"),
        ("steps=1001", "steps"),
        ("steps=many", "steps"),
        ("timeout_s=0", "timeout_s"),
        ("timeout_s=nan", "timeout_s"),
        ("timeout_s=1e9", "timeout_s"),
        ("format=png", "format"),
        ("step=3", "step"),
    ],
)
def test_what_is_wrong_is_refused_by_name(query: str, param: str, one: Live) -> None:
    answer = one.http.get(f"/profile?{query}")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    if param == "step":
        assert "did you mean 'steps'" in answer.json()["error"]["message"]


def test_one_at_a_time_and_a_client_that_leaves_ends_its_own(one: Live) -> None:
    with httpx.Client(base_url=one.url) as leaving:
        with pytest.raises(httpx.ReadTimeout):
            leaving.get("/profile", timeout=0.3)
        wait_until(lambda: not is_profiled(one))
    first = Asking(one, "/profile?steps=5")
    wait_until(lambda: is_profiled(one))
    second = one.http.get("/profile")
    assert second.status_code == 409
    assert second.json()["error"]["code"] == "profile_running"
    complete(one)
    assert first.answer().status_code == 200


def test_it_asks_for_the_key_and_a_drain_does_not_wait_for_it(model_folder: Path) -> None:
    with live(model_folder, api_key=("one",)) as guarded:
        assert guarded.http.get("/profile").status_code == 401
        headers = {"Authorization": "Bearer one"}
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.get(f"{guarded.url}/profile", headers=headers, timeout=60))
        )
        asking.start()
        wait_until(lambda: is_profiled(guarded))
        guarded.server.client.thread.drain()
        asking.join(20)
        assert answers and answers[0].status_code == 503
    assert guarded.code == 0
