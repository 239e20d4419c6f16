"""POST /v1/chat/completions: a conversation in; the model's message, log-probabilities and usage out."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from onegraph.engine.outputs import CompletionOutput, Logprob
from onegraph.errors import ConfigError, ModelError
from onegraph.serve.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    TokenLogprob,
    TopLogprob,
)
from onegraph.serve.api_errors import ApiError, of_config_error
from onegraph.serve.engine_client import EngineClient
from onegraph.serve.generation import Form, answer_stream, answer_whole
from onegraph.serve.logprob_values import finite
from onegraph.serve.protocol import ChatCompletionRequest, Message
from onegraph.serve.sampling import sampling_params

PATH = "/v1/chat/completions"


async def chat(
    client: EngineClient, request: Request, body: ChatCompletionRequest, *, model: str, max_n: int
) -> Response:
    """Answers a conversation. Raises ApiError for one that can't be served."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is only for logprobs=true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are the same: give one", param="max_tokens")
    params = sampling_params(
        body,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        max_n=max_n,
    )
    messages = [_message(message) for message in body.messages]
    try:
        _, token_ids = await client.tokenized(lambda text: text.encode_chat(messages))
        job = client.submit([token_ids], params, stream=bool(body.stream))
    except ConfigError as error:
        fields = ChatCompletionRequest.model_fields.keys() - {"messages"}
        raise of_config_error(error, fields, param="messages") from error
    except ModelError as error:
        raise ApiError(400, f"{error.message}; use /v1/completions", param="messages") from error
    form = ChatForm("chatcmpl", model, n=params.n, prompt_tokens=len(token_ids), num_top=params.logprobs or 0)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return answer_stream(job, form, client.metrics, include_usage=include_usage)
    return await answer_whole(request, job, form, client.metrics)


class ChatForm(Form):
    """Chat completions."""

    endpoint = PATH

    def __init__(self, prefix: str, model: str, *, n: int, prompt_tokens: int, num_top: int) -> None:
        super().__init__(prefix, model, n=n, prompt_tokens=prompt_tokens)
        self._num_top = num_top
        self._begun: set[int] = set()

    def chunks(self, index: int, sample: CompletionOutput) -> list[BaseModel]:
        """The role with a message's first token, then one chunk a step."""
        chunks: list[BaseModel] = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(self._chunk(ChatChunkChoice(index=index, delta={"role": "assistant", "content": ""})))
        choice = ChatChunkChoice(
            index=index,
            delta={"content": sample.text},
            logprobs=_logprobs(sample, self._num_top),
            finish_reason=_finish_reason(sample),
            stop_reason=sample.stop_reason,
        )
        return [*chunks, self._chunk(choice)]

    def usage_chunk(self) -> BaseModel:
        """No choices, and the usage."""
        chunk = self._chunk()
        chunk.usage = self.usage()
        return chunk

    def whole(self, samples: dict[int, CompletionOutput]) -> BaseModel:
        """All messages in the order of their index."""
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(content=samples[index].text),
                logprobs=_logprobs(samples[index], self._num_top),
                finish_reason=_finish_reason(samples[index]),
                stop_reason=samples[index].stop_reason,
            )
            for index in sorted(samples)
        ]
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage())

    def _chunk(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=list(choices))


def _finish_reason(sample: CompletionOutput) -> Any:
    assert sample.finish_reason != "abort"
    return sample.finish_reason


def _message(message: Message) -> dict[str, Any]:
    """As templates take it: the content is one text."""
    content = message.content
    if content is None:
        raise ApiError(400, "messages.content: null is no content", param="messages")
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    facts = {"role": message.role, "content": text}
    return facts if message.name is None else {**facts, "name": message.name}


def _logprobs(sample: CompletionOutput, num_top: int) -> ChatLogprobs | None:
    if sample.logprobs is None:
        return None
    content = []
    for token_id, entries in zip(sample.token_ids, sample.logprobs, strict=True):
        top = [TopLogprob(**_facts(entry)) for entry in list(entries.values())[:num_top]]
        content.append(TokenLogprob(**_facts(entries[token_id]), top_logprobs=top))
    return ChatLogprobs(content=content)


def _facts(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token
    return {"token": text, "logprob": finite(entry), "bytes": None if "�" in text else list(text.encode())}
