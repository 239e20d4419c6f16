"""What is wrong is answered with an OpenAI-shaped 4xx that names the field; nothing of it reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.serve.live_server import Live

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEEP = "[" * 3000 + "]" * 3000

WRONG: list[tuple[str, str, str | None, str]] = [
    # path, body, param, part of the message
    (COMPLETIONS, "", None, "JSON object"),
    (COMPLETIONS, "{", None, "isn't JSON"),
    (COMPLETIONS, "[]", None, "JSON object"),
    (COMPLETIONS, "3", None, "JSON object"),
    (COMPLETIONS, "null", None, "JSON object"),
    (COMPLETIONS, "{}", "prompt", "required"),
    (COMPLETIONS, '{"prompt": null}', "prompt", "string"),
    (COMPLETIONS, '{"prompt": ""}', "prompt", "no tokens"),
    (COMPLETIONS, '{"prompt": []}', "prompt", "at least 1"),
    (COMPLETIONS, '{"prompt": [[]]}', "prompt", "no tokens"),
    (COMPLETIONS, '{"prompt": 3}', "prompt", "string"),
    (COMPLETIONS, '{"prompt": {"a": 1}}', "prompt", "string"),
    (COMPLETIONS, '{"prompt": ["a", 1]}', "prompt", "string"),
    (COMPLETIONS, '{"prompt": [1, "a"]}', "prompt", "integer"),
    (COMPLETIONS, '{"prompt": [true]}', "prompt", "integer"),
    (COMPLETIONS, '{"prompt": [1.5]}', "prompt", "integer"),
    (COMPLETIONS, '{"prompt": [-1]}', "prompt", "greater than or equal to 0"),
    (COMPLETIONS, '{"prompt": [264]}', "prompt", "token id 264"),
    (COMPLETIONS, '{"prompt": [1e9]}', "prompt", "integer"),
    (COMPLETIONS, '{"prompt": "\\ud800"}', "prompt", "surrogate"),
    (COMPLETIONS, '{"prompt": "a", "stop": "\\ud800"}', "stop", "surrogate"),
    (COMPLETIONS, '{"prompt": "a", "\\ud800": 1}', None, "unicode"),
    (CHAT, '{"messages": [{"role": "\\ud800", "content": "a"}]}', "messages", "surrogate"),
    (COMPLETIONS, json.dumps({"prompt": "a" * 128}), "prompt", "128 tokens"),
    (COMPLETIONS, json.dumps({"prompt": [[1], [1] * 200]}), "prompt", "200 tokens"),
    (COMPLETIONS, '{"prompt": "a", "prompt_logprobs": 1}', "prompt_logprobs", "doesn't take"),
    (COMPLETIONS, '{"prompt": "a", "max_token": 1}', "max_token", "did you mean 'max_tokens'"),
    (COMPLETIONS, '{"prompt": "a", "suffix": "b"}', "suffix", "doesn't take"),
    (COMPLETIONS, '{"prompt": "a", "echo": true}', "echo", "False"),
    (COMPLETIONS, '{"prompt": "a", "best_of": 2}', "best_of", "best_of=2"),
    (COMPLETIONS, '{"prompt": "a", "max_tokens": 0}', "max_tokens", "greater than or equal to 1"),
    (COMPLETIONS, '{"prompt": "a", "max_tokens": "5"}', "max_tokens", "integer"),
    (COMPLETIONS, '{"prompt": "a", "max_tokens": 5.0}', "max_tokens", "integer"),
    (COMPLETIONS, '{"prompt": "a", "max_tokens": true}', "max_tokens", "integer"),
    (COMPLETIONS, '{"prompt": "a", "max_tokens": 1e400}', "max_tokens", "integer"),
    (COMPLETIONS, f'{{"prompt": "a", "max_tokens": {"9" * 40}}}', "max_tokens", "less than or equal"),
    (COMPLETIONS, f'{{"prompt": "a", "max_tokens": {"9" * 5000}}}', None, "pars"),
    (COMPLETIONS, f'{{"prompt": {DEEP}}}', None, "pars"),
    (COMPLETIONS, '{"prompt": "a", "temperature": NaN}', "temperature", "finite"),
    (COMPLETIONS, '{"prompt": "a", "temperature": Infinity}', "temperature", "finite"),
    (COMPLETIONS, '{"prompt": "a", "temperature": 1e400}', "temperature", "finite"),
    (COMPLETIONS, '{"prompt": "a", "temperature": -1}', "temperature", "greater than or equal to 0"),
    (COMPLETIONS, '{"prompt": "a", "temperature": "hot"}', "temperature", "number"),
    (COMPLETIONS, '{"prompt": "a", "top_p": 0}', "top_p", "greater than 0"),
    (COMPLETIONS, '{"prompt": "a", "top_p": 1.1}', "top_p", "less than or equal to 1"),
    (COMPLETIONS, '{"prompt": "a", "top_k": -2}', "top_k", "greater than or equal to -1"),
    (COMPLETIONS, '{"prompt": "a", "min_p": 2}', "min_p", "less than or equal to 1"),
    (COMPLETIONS, '{"prompt": "a", "n": 0}', "n", "greater than or equal to 1"),
    (COMPLETIONS, '{"prompt": "a", "n": 129}', "n", "n=129"),
    (COMPLETIONS, '{"prompt": "a", "seed": 1.5}', "seed", "integer"),
    (COMPLETIONS, '{"prompt": "a", "stop": 3}', "stop", "string"),
    (COMPLETIONS, '{"prompt": "a", "stop": [""]}', "stop", "at least 1"),
    (COMPLETIONS, '{"prompt": "a", "stop_token_ids": [999]}', "stop_token_ids", "token id 999"),
    (COMPLETIONS, '{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias", "'x' is no token id"),
    (COMPLETIONS, '{"prompt": "a", "logit_bias": {"999": 1}}', "logit_bias", "token id 999"),
    (COMPLETIONS, '{"prompt": "a", "logit_bias": {"1": 101}}', "logit_bias", "less than or equal to 100"),
    (COMPLETIONS, '{"prompt": "a", "logit_bias": [1]}', "logit_bias", "dictionary"),
    (COMPLETIONS, '{"prompt": "a", "logprobs": 21}', "logprobs", "less than or equal to 20"),
    (COMPLETIONS, '{"prompt": "a", "logprobs": true}', "logprobs", "integer"),
    (COMPLETIONS, '{"prompt": "a", "presence_penalty": 3}', "presence_penalty", "less than or equal to 2"),
    (COMPLETIONS, '{"prompt": "a", "frequency_penalty": -3}', "frequency_penalty", "greater than or equal to -2"),
    (COMPLETIONS, '{"prompt": "a", "repetition_penalty": 0}', "repetition_penalty", "greater than or equal to 0.01"),
    (COMPLETIONS, '{"prompt": "a", "min_tokens": 17}', "min_tokens", "at most max_tokens"),
    (COMPLETIONS, '{"prompt": "a", "stream": "yes"}', "stream", "boolean"),
    (COMPLETIONS, '{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options", "stream=true"),
    (COMPLETIONS, '{"prompt": "a", "stream": true, "stream_options": {"x": 1}}', "stream_options", "stream_options.x"),
    (COMPLETIONS, '{"prompt": "a", "ignore_eos": 1}', "ignore_eos", "boolean"),
    (COMPLETIONS, '{"prompt": "a", "model": 3}', "model", "string"),
    (COMPLETIONS, '{"prompt": "a", "user": 3}', "user", "string"),
    (CHAT, "{}", "messages", "required"),
    (CHAT, '{"messages": []}', "messages", "at least 1"),
    (CHAT, '{"messages": "hi"}', "messages", "list"),
    (CHAT, '{"messages": [{"content": "hi"}]}', "messages", "messages.0.role"),
    (CHAT, '{"messages": [{"role": "user"}]}', "messages", "no content"),
    (CHAT, '{"messages": [{"role": "wizard", "content": "hi"}]}', "messages", "unknown role wizard"),
    (CHAT, '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "messages", "'text'"),
    (CHAT, json.dumps({"messages": [{"role": "user", "content": "a" * 200}]}), "messages", "tokens"),
    (CHAT, '{"messages": [{"role": "user", "content": "a"}], "tools": []}', "tools", "doesn't take"),
    (CHAT, '{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}', "top_logprobs", "logprobs=true"),
    (CHAT, '{"messages": [{"role": "user", "content": "a"}], "logprobs": 2}', "logprobs", "boolean"),
    (
        CHAT,
        '{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "max_completion_tokens": 3}',
        "max_tokens",
        "the same",
    ),
    (
        CHAT,
        '{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}}',
        "response_format",
        "'text'",
    ),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_body(path: str, body: str, param: str | None, message: str, server: Live) -> None:
    response = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error"), error
    assert message in error["message"]
    assert server.is_empty()


def test_the_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("path", ["/", "/v1/embeddings", "/v1/nothing", "/profiles", "/docs", "/v1/completions/"])
def test_paths_that_are_not_there(path: str, server: Live) -> None:
    response = server.http.request("POST" if "embeddings" in path else "GET", path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"


def test_a_method_that_a_path_does_not_take(server: Live) -> None:
    response = server.http.get(COMPLETIONS)
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert "GET isn't for /v1/completions" in response.json()["error"]["message"]


def test_a_body_must_say_that_it_is_json(server: Live) -> None:
    """A page elsewhere can have a browser post plain text to 127.0.0.1, but not JSON."""
    response = server.http.post(COMPLETIONS, content='{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 400 and "application/json" in response.json()["error"]["message"]


def test_null_asks_for_nothing(server: Live) -> None:
    from onegraph.serve.protocol import CompletionRequest

    nothing: dict[str, Any] = dict.fromkeys([*CompletionRequest.model_fields, "suffix", "unknown"])
    response = server.http.post(COMPLETIONS, json={**nothing, "prompt": "a"})
    assert response.status_code == 200, response.text
