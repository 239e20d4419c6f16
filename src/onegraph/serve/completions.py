"""POST /v1/completions: texts or token ids, one or several, in; texts, log-probabilities and usage out."""

from __future__ import annotations

from collections import Counter

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel

from onegraph.engine.outputs import CompletionOutput
from onegraph.engine.text import Text
from onegraph.errors import ConfigError
from onegraph.serve.answers import Completion, CompletionChoice, CompletionLogprobs
from onegraph.serve.api_errors import ApiError, of_config_error
from onegraph.serve.engine_client import EngineClient
from onegraph.serve.generation import Form, answer_stream, answer_whole
from onegraph.serve.logprob_values import finite
from onegraph.serve.protocol import CompletionRequest
from onegraph.serve.sampling import sampling_params

PATH = "/v1/completions"
DEFAULT_MAX_TOKENS = 16


async def complete(
    client: EngineClient, request: Request, body: CompletionRequest, *, model: str, max_n: int
) -> Response:
    """Answers a request. Raises ApiError for one that can't be served."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, f"best_of={body.best_of} must equal n: texts aren't ranked here", param="best_of")
    params = sampling_params(
        body,
        max_tokens=body.max_tokens if body.max_tokens is not None else DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        max_n=max_n,
    )
    try:
        prompts = await client.tokenized(lambda text: _prompts(body, text))
        job = client.submit(prompts, params, stream=bool(body.stream))
    except ConfigError as error:
        raise of_config_error(error, CompletionRequest.model_fields, param="prompt") from error
    form = CompletionForm("cmpl", model, n=params.n, prompt_tokens=sum(map(len, prompts)))
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return answer_stream(job, form, client.metrics, include_usage=include_usage)
    return await answer_whole(request, job, form, client.metrics)


class CompletionForm(Form):
    """Text completions."""

    endpoint = PATH

    def __init__(self, prefix: str, model: str, *, n: int, prompt_tokens: int) -> None:
        super().__init__(prefix, model, n=n, prompt_tokens=prompt_tokens)
        self._offsets: Counter[int] = Counter()  # characters of each choice's tokens so far

    def chunks(self, index: int, sample: CompletionOutput) -> list[BaseModel]:
        """One chunk a step."""
        return [self._object([self._choice(index, sample)])]

    def usage_chunk(self) -> BaseModel:
        """No choices, and the usage."""
        return self._object([], with_usage=True)

    def whole(self, samples: dict[int, CompletionOutput]) -> BaseModel:
        """All choices in the order of their index."""
        return self._object([self._choice(index, samples[index]) for index in sorted(samples)], with_usage=True)

    def _object(self, choices: list[CompletionChoice], *, with_usage: bool = False) -> Completion:
        usage = self.usage() if with_usage else None
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _choice(self, index: int, sample: CompletionOutput) -> CompletionChoice:
        assert sample.finish_reason != "abort"
        return CompletionChoice(
            index=index,
            text=sample.text,
            logprobs=None if sample.logprobs is None else self._logprobs(index, sample),
            finish_reason=sample.finish_reason,
            stop_reason=sample.stop_reason,
        )

    def _logprobs(self, index: int, sample: CompletionOutput) -> CompletionLogprobs:
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, entries in zip(sample.token_ids, sample.logprobs or [], strict=True):
            own = entries[token_id]
            top: dict[str, float] = {}
            for entry in entries.values():
                top.setdefault(entry.decoded_token, finite(entry))  # of tokens that look alike, the likeliest
            result.tokens.append(own.decoded_token)
            result.token_logprobs.append(finite(own))
            result.top_logprobs.append(top)
            result.text_offset.append(self._offsets[index])
            self._offsets[index] += len(own.decoded_token)
        return result


def _prompts(body: CompletionRequest, text: Text) -> list[list[int]]:
    """The token ids of each prompt."""
    given = body.prompt
    if isinstance(given, str):
        return [text.encode(given)]
    if not given or isinstance(given[0], int):
        return [given]  # type: ignore[list-item]
    return [text.encode(one) if isinstance(one, str) else one for one in given]  # type: ignore[misc]
