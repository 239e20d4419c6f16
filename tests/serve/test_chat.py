"""/v1/chat/completions through the openai client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from onegraph import LLM, SamplingParams

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


def chat(client: openai.OpenAI, messages: list[Any] = MESSAGES, **fields: Any) -> Any:
    given = {"model": "tiny", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}, **fields}
    return client.chat.completions.create(messages=messages, **given)


@pytest.fixture(scope="module")
def expected(llm: LLM) -> Any:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
    return llm.chat(MESSAGES, params, use_tqdm=False)[0]


def test_a_message_and_its_usage(client: openai.OpenAI, expected: Any) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.outputs[0].text)
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids) and answer.usage.completion_tokens == 12


def test_a_stream_begins_with_the_role_and_adds_up(client: openai.OpenAI, expected: Any) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].object == "chat.completion.chunk"
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(one.delta.content or "" for one in deltas) == expected.outputs[0].text
    assert [one.finish_reason for one in deltas if one.finish_reason] == ["length"]
    assert chunks[-1].usage.completion_tokens == 12


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_most_tokens(name: str, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": openai.omit, name: 3}
    assert chat(client, **fields).usage.completion_tokens == 3


def test_without_a_limit_the_models_length_ends_a_message(client: openai.OpenAI, expected: Any) -> None:
    answer = chat(client, max_tokens=openai.omit)
    assert answer.usage.total_tokens == 128 and answer.choices[0].finish_reason == "length"


def test_logprobs(client: openai.OpenAI, expected: Any) -> None:
    sample = expected.outputs[0]
    given = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    for token_id, entry, one in zip(sample.token_ids, sample.logprobs, given, strict=True):
        own = entry[token_id]
        assert one.token == own.decoded_token and one.logprob == pytest.approx(own.logprob, abs=1e-5)
        assert one.bytes == (None if "�" in one.token else list(one.token.encode()))
        best = list(entry.values())[:2]
        assert [top.token for top in one.top_logprobs] == [top.decoded_token for top in best]
        assert [top.logprob for top in one.top_logprobs] == pytest.approx([top.logprob for top in best], abs=1e-5)
    streamed = [
        c.logprobs.content[0] for chunk in chat(client, logprobs=True, stream=True) for c in chunk.choices if c.logprobs
    ]
    assert [one.token for one in streamed] == [one.token for one in given]
    assert all(one.top_logprobs == [] for one in streamed)


def test_several_messages_with_a_seed_and_a_stop(client: openai.OpenAI, llm: LLM) -> None:
    [answer] = llm.chat(
        MESSAGES, SamplingParams(n=2, seed=4, temperature=1.5, max_tokens=10, ignore_eos=True), use_tqdm=False
    )
    given = chat(client, n=2, seed=4, temperature=1.5, max_tokens=10)
    assert [c.message.content for c in given.choices] == [sample.text for sample in answer.outputs]
    stop = answer.outputs[0].text[2:4]
    cut = chat(client, n=2, seed=4, temperature=1.5, max_tokens=10, stop=stop, user="somebody")
    assert cut.choices[0].message.content == answer.outputs[0].text.split(stop)[0]
    assert cut.choices[0].finish_reason == "stop"


def test_content_in_parts_and_what_the_client_sends_back(client: openai.OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    first = chat(client, parts)
    assert first.choices[0].message.content == chat(client).choices[0].message.content
    again = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "more"}]
    assert chat(client, again).choices[0].message.content
