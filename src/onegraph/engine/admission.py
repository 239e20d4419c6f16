"""Whether a model can serve a request at all.

Takes: a prompt's token ids and parameters, with the engine's limits. Raises ConfigError, with numbers, for
what can
never be served: everything else is served sooner or later.
"""

from collections.abc import Iterable, Sequence

from onegraph.engine.limits import Limits
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.text import Text
from onegraph.errors import ConfigError


def check_prompt(token_ids: Sequence[int], *, limits: Limits, vocab_size: int, where: str) -> None:
    """A prompt has a token, leaves room for another, and is made of tokens that exist."""
    limit, length = limits.max_model_len, len(token_ids)
    if not length:
        raise ConfigError("the prompt has no tokens", where=where, hint="give at least one token")
    if length >= limit:
        because = "".join(f" ({reason})" for reason in limits.downgrades)
        raise ConfigError(
            f"the prompt has {length} tokens, but max_model_len={limit} must hold the output too{because}",
            where=where,
            hint=f"shorten it to at most {limit - 1} tokens",
        )
    _check_ids("the prompt", token_ids, vocab_size, where)


def check_params(params: SamplingParams, *, text: Text, vocab_size: int, where: str) -> None:
    """Parameters name tokens that exist, no more of them than there are, and text only where there is
    text.
    """
    _check_ids("logit_bias", params.bias, vocab_size, where)
    _check_ids("stop_token_ids", params.stop_ids, vocab_size, where)
    for name in ("logprobs", "prompt_logprobs"):
        number = getattr(params, name)
        if number is not None and number > vocab_size:
            raise ConfigError(
                f"{name}={number} is more than the {vocab_size} tokens of the vocabulary",
                where=where,
                hint=f"give at most {vocab_size}",
            )
    if params.stop_strings and text.tokenizer is None:
        raise ConfigError(
            f"stop={list(params.stop_strings)} needs text, but the model has no tokenizer",
            where=where,
            hint="use stop_token_ids",
        )


def _check_ids(what: str, ids: Iterable[int], vocab_size: int, where: str) -> None:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise ConfigError(
            f"token id {wrong} in {what} does not exist",
            where=where,
            hint=f"the vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}",
        )
