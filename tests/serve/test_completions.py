"""/v1/completions through the openai client: tokens, texts, log-probabilities, streams and usage as LLM has them."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from onegraph import LLM, SamplingParams
from tests.serve.live_server import Live

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
EXTRA = {"ignore_eos": True}


def offline(llm: LLM, prompt: Any, **fields: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields}
    return llm.generate(prompt, SamplingParams(**given), use_tqdm=False)


def complete(client: openai.OpenAI, prompt: Any, **fields: Any) -> Any:
    extra = {**EXTRA, **fields.pop("extra_body", {})}
    given = {"model": "tiny", "temperature": 0, "max_tokens": 12, **fields}
    return client.completions.create(prompt=prompt, extra_body=extra, **given)


def test_a_text_and_its_usage(client: openai.OpenAI, llm: LLM) -> None:
    answer = complete(client, "def f")
    [expected] = offline(llm, "def f")
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, expected.outputs[0].text, "length")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 12, 17)


def test_all_forms_of_a_prompt(client: openai.OpenAI, llm: LLM) -> None:
    texts = ["def f", "hello there"]
    ids = [llm.get_tokenizer()(text)["input_ids"] for text in texts]
    expected = [output.outputs[0].text for output in offline(llm, texts)]
    assert [c.text for c in complete(client, texts).choices] == expected
    assert [c.text for c in complete(client, ids).choices] == expected
    assert complete(client, ids[0]).choices[0].text == expected[0]
    streamed = ["", ""]
    for chunk in complete(client, texts, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


def test_samples_of_several_prompts_have_their_places(client: openai.OpenAI, llm: LLM) -> None:
    fields = {"n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 6}
    prompts = ["one", "two"]
    expected = [sample.text for output in offline(llm, prompts, **fields) for sample in output.outputs]
    assert len(set(expected)) == 6
    answer = complete(client, prompts, **fields)
    assert [c.index for c in answer.choices] == list(range(6))
    assert [c.text for c in answer.choices] == expected
    assert answer.usage.completion_tokens == 36
    streamed: dict[int, str] = dict.fromkeys(range(6), "")
    ends = {}
    for chunk in complete(client, prompts, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert list(streamed.values()) == expected and ends == dict.fromkeys(range(6), "length")


def test_a_stream_ends_with_usage_only_where_asked(client: openai.OpenAI) -> None:
    chunks = list(complete(client, "hello", stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.choices for chunk in complete(client, "hello", stream=True))


def test_what_vllm_bench_serve_sends(server: Live) -> None:
    body = {
        "model": "tiny",
        "prompt": "hello",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 5,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "some_unknown_field": None,
    }
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]" and len(events) == 5 + 1 + 1


def test_logprobs(client: openai.OpenAI, llm: LLM) -> None:
    [expected] = offline(llm, "hello", logprobs=3)
    sample = expected.outputs[0]
    entries = [entry[i] for i, entry in zip(sample.token_ids, sample.logprobs, strict=True)]
    given = complete(client, "hello", logprobs=3).choices[0].logprobs
    assert given.tokens == [entry.decoded_token for entry in entries]
    assert given.token_logprobs == pytest.approx([entry.logprob for entry in entries], abs=1e-5)
    offsets = [sum(len(token) for token in given.tokens[:at]) for at in range(12)]
    assert given.text_offset == offsets
    for top, entry in zip(given.top_logprobs, sample.logprobs, strict=True):
        assert top == pytest.approx({one.decoded_token: one.logprob for one in reversed(entry.values())}, abs=1e-5), (
            "the likeliest of tokens that look alike"
        )
    assert complete(client, "hello").choices[0].logprobs is None
    streamed = [c.choices[0].logprobs for c in complete(client, "hello", logprobs=3, stream=True)]
    assert [token for one in streamed for token in one.tokens] == given.tokens
    assert [at for one in streamed for at in one.text_offset] == offsets
    own = complete(client, "hello", logprobs=0).choices[0].logprobs
    assert [list(top) for top in own.top_logprobs] == [[token] for token in given.tokens]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.5, "temperature": 1.3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -1.5},
        {"logit_bias": {"97": 100}},
        {"min_p": 0.3, "temperature": 2.0},
        {"top_k": 3, "temperature": 2.0},
        {"repetition_penalty": 1.8},
        {"stop_token_ids": [1, 2, 3, 100, 101], "min_tokens": 4},
        {"ignore_eos": False, "max_tokens": 40},
    ],
    ids=str,
)
def test_each_sampling_field_has_the_effect_that_it_has_offline(
    fields: dict[str, Any], client: openai.OpenAI, llm: LLM
) -> None:
    settings = {"seed": 3, "max_tokens": 20, **fields}
    bias = {int(token): value for token, value in settings.get("logit_bias", {}).items()}
    [expected] = offline(llm, "hello world", **{**settings, "logit_bias": bias})
    extra = {name: settings.pop(name) for name in list(settings) if name not in OPENAI_FIELDS}
    answer = complete(client, "hello world", extra_body=extra, **settings)
    sample = expected.outputs[0]
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (sample.text, sample.finish_reason)
    assert answer.usage.completion_tokens == len(sample.token_ids)


OPENAI_FIELDS = {"seed", "max_tokens", "top_p", "temperature", "presence_penalty", "frequency_penalty", "logit_bias"}


def test_a_seed_repeats_and_none_does_not(client: openai.OpenAI) -> None:
    def text(**fields: Any) -> str:
        return complete(client, "hello", temperature=2.0, max_tokens=20, **fields).choices[0].text

    assert text(seed=5) == text(seed=5) != text(seed=6)
    assert text() != text()


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_the_borders_of_chunks_never_shows(stream: bool, client: openai.OpenAI, llm: LLM) -> None:
    """Only letters are allowed, one a token, so a stop string of three letters lies in three chunks."""
    bias = {str(i): 100 for i in llm.get_tokenizer()("abcdefgh")["input_ids"]}
    fields = {"logit_bias": bias, "max_tokens": 30, "presence_penalty": 1.0}
    whole = complete(client, "some text", **fields).choices[0].text
    stop = whole[7:10]
    at = whole.index(stop)
    answer = complete(client, "some text", stop=["zz", stop], stream=stream, **fields)
    if stream:
        pieces = [chunk.choices[0] for chunk in answer]
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
    else:
        last = answer.choices[0]
        text = last.text
    assert (text, last.finish_reason, last.stop_reason) == (whole[:at], "stop", stop)


def test_no_chunk_has_half_a_character(client: openai.OpenAI, llm: LLM) -> None:
    ids = [i for character in "ü€😀" for i in llm.get_tokenizer()(character)["input_ids"]]
    text = ""
    for seed in range(4):
        fields = {"logit_bias": {str(i): 100 for i in ids}, "temperature": 2.0, "seed": seed, "max_tokens": 40}
        whole = complete(client, "x", **fields).choices[0].text
        pieces = [chunk.choices[0].text for chunk in complete(client, "x", stream=True, **fields)]
        assert "".join(pieces) == whole
        assert not any(piece.endswith("�") for piece in pieces[:-1])
        text += whole
    assert any(ord(character) > 127 and character != "�" for character in text)  # of several bytes, and whole


def test_a_prompt_that_was_seen_before_comes_from_the_prefix_cache(client: openai.OpenAI) -> None:
    prompt = "a long prompt that fills some blocks of the cache, " * 2
    complete(client, prompt, max_tokens=1)
    usage = complete(client, prompt, max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens == (len(prompt) - 1) // 16 * 16
