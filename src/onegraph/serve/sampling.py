"""From a request's fields to the engine's SamplingParams, with errors that name the field."""

from __future__ import annotations

from onegraph.engine.sampling_params import SamplingParams
from onegraph.errors import ConfigError
from onegraph.serve.api_errors import ApiError, of_config_error
from onegraph.serve.protocol import SamplingFields

DIRECT = (
    *("n", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty"),
    *("ignore_eos", "min_tokens", "top_k", "min_p", "repetition_penalty", "stop_token_ids"),
)


def sampling_params(
    request: SamplingFields, *, max_tokens: int | None, logprobs: int | None, max_n: int
) -> SamplingParams:
    """The parameters; what is null has the default. Raises ApiError that names the field."""
    if request.n is not None and request.n > max_n:
        raise ApiError(400, f"n={request.n} is more than this server's {max_n} (--max-n)", param="n")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only for stream=true", param="stream_options")
    given = {name: value for name in DIRECT if (value := getattr(request, name)) is not None}
    try:
        return SamplingParams(
            **given, max_tokens=max_tokens, logprobs=logprobs, logit_bias=_logit_bias(request.logit_bias)
        )
    except ConfigError as error:
        raise of_config_error(error, type(request).model_fields) from error


def _logit_bias(given: dict[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    wrong = next((key for key in given if not (key.isascii() and key.isdigit() and len(key) < 12)), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias: {wrong[:40]!r} is no token id", param="logit_bias")
    return {int(key): value for key, value in given.items()}
