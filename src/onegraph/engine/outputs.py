"""What a request gives back: frozen records that `LLM.generate` returns and a server streams."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """The model's natural-log probability of a token; `rank` 1 is the likeliest; its text alone."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""Token id -> Logprob for one position: the likeliest tokens, best first, and the token that stands there."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a request.

    token_ids: the generated tokens, a token that ended the text included (`text` leaves it out).
    finish_reason: "stop" (a stop token or string), "length" (max_tokens or the model's length), "abort"; None
        while it runs. stop_reason: the stop string or stop token id that ended it, None for the model's own
        end of text.
    cumulative_logprob: the sum over `token_ids`; it and `logprobs` are None unless log-probabilities were
        asked for.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds of `time.monotonic()`; how many prompt tokens came from the prefix cache."""

    arrival_s: float
    first_token_s: float | None = None
    finished_s: float | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One request with all its samples, in the order of their index.

    A stream's output holds what is new since the one before: the samples that have a new token or have ended, each
    with its new text, tokens and log-probabilities.

    prompt: the text, or None when token ids were given. prompt_logprobs: one entry for each prompt token,
    None for the first (nothing stands before it). error: why a request ended with "abort" though nobody
    aborted it.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0))
    error: str | None = None
