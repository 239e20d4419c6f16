"""The app's own OpenAPI description: whatever it allows, and much that it doesn't, finds no answer of 500 or more."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serve.live_server import Live, live, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of the packages that it imports
    import schemathesis
    from schemathesis import GenerationMode

EXAMPLES = int(os.environ.get("SERVE_EXAMPLES", "40"))
"""Requests for each path and way of making them."""


@pytest.fixture(scope="module", autouse=True)
def recursion_limit() -> Iterator[None]:
    """Python's limit is the process's, and hypothesis raises it while it makes nested values."""
    before = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(before)


@pytest.fixture(scope="module")
def described(model_folder: Path) -> Iterator[Live]:
    with live(model_folder, max_n=4, engine={"max_num_seqs": 8}) as one:
        yield one
        wait_until(one.is_empty)


def paths() -> list[tuple[str, str]]:
    return [
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name}"),
        ("GET", "/explain"),
        ("GET", "/profile"),
        ("GET", "/health"),
        ("GET", "/ready"),
        ("GET", "/version"),
        ("GET", "/metrics"),
    ]


def test_every_path_is_described(described: Live) -> None:
    spec = described.http.get("/openapi.json").json()
    assert {(method.upper(), path) for path, item in spec["paths"].items() for method in item} == set(paths())


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "not allowed"])
@pytest.mark.parametrize(("method", "path"), paths(), ids=lambda value: value)
def test_no_answer_of_500_or_more(method: str, path: str, mode: Any, described: Live) -> None:
    schema = schemathesis.openapi.from_dict(described.http.get("/openapi.json").json())
    operation = schema[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET" and path != "/profile":
        pytest.skip("nothing can be wrong in a request without parts")
    seen: list[int] = []

    @settings(
        max_examples=EXAMPLES if method == "POST" else 5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if len(seen) % 2 and isinstance(case.body, dict):
            make_likelier(case.body)
        if path == "/profile":
            case.query = {**(case.query or {}), "timeout_s": 0.01}  # there is no traffic to wait for
        answer = case.call(base_url=described.url, timeout=60)
        seen.append(answer.status_code)
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()) == {"error"}, answer.text

    check()
    assert seen and (mode is GenerationMode.NEGATIVE or method == "GET" or 200 in seen), set(seen)
    assert described.http.get("/health").status_code == 200


def make_likelier(body: dict[str, Any]) -> None:
    """What a description can't say: the model's name and roles, and how much fits."""
    for name in ("model", "n", "best_of", "logit_bias", "stop_token_ids", "min_tokens", "max_completion_tokens"):
        body.pop(name, None)
    for name in ("stream_options", "logprobs", "top_logprobs"):
        body.pop(name, None)
    body["max_tokens"] = 3
    if isinstance(body.get("prompt"), list):
        body["prompt"] = "a"
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, dict):
            message.update(role="user", content=message.get("content") or "a")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_one_field_of_any_value_beside_good_ones(path: str, described: Live) -> None:
    from onegraph.serve.protocol import ChatCompletionRequest, CompletionRequest

    chat = "chat" in path
    good = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    fields = sorted((ChatCompletionRequest if chat else CompletionRequest).model_fields)
    seen = set()

    @settings(max_examples=5 * EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(name=st.sampled_from(fields), value=VALUES)
    def check(name: str, value: Any) -> None:
        body = json.dumps({**good, "max_tokens": 2, name: value})
        answer = described.http.post(path, content=body, headers={"Content-Type": "application/json"})
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["param"] == name, (body, answer.text)

    check()
    assert {200, 400} <= seen
