"""What one request asks of the sampler and when it stops, as a validated, frozen dataclass.

Takes: the names of the public API; names and meanings are those of OpenAI's API where it has them
(temperature, top_p, n, seed, stop, the presence and frequency penalties, logit_bias) and of vLLM's elsewhere.
Keeps: every field within its range; sequences as tuples, so that a value can be shared between requests.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onegraph.errors import ConfigError

# Below this temperature the division by it has no meaning left in fp32; the request is served greedily.
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    n: samples of the prompt, each with a random stream of its own.
    temperature: 0 is greedy (arg max); else the logits are divided by it.
    top_p, top_k, min_p: keep the smallest set of tokens with probability >= top_p; the top_k most likely (0
        or -1: all); those with at least min_p times the probability of the likeliest. Applied in the order
        min_p, top_k, top_p.
    seed: fixes the random stream, whatever else is in the batch; None draws a seed from the engine's.
    max_tokens: most tokens to generate (None: up to the model's length); min_tokens: nothing ends the text
        before that many, and no stop string that begins before ends it later.
    stop: strings that end the text, which is cut before them; stop_token_ids: tokens that do.
    ignore_eos: the model's own end-of-sequence tokens don't end the text.
    logprobs, prompt_logprobs: for each generated (prompt) token the model's log-probabilities of this many
        likeliest tokens, and of the token itself, before any of the settings here; 0 gives the token's alone,
        None nothing.
    presence_penalty, frequency_penalty: subtracted from a token's logit once, and per occurrence, in the
        output.
    repetition_penalty: divides (multiplies, when negative) the logits of tokens in the prompt or output
        (CTRL, arXiv:1909.05858).
    logit_bias: token id -> what is added to its logit, -100 to 100.
    Errors: `ConfigError` naming the field, its value and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        self._check_int("n", 1)
        self._check_float("temperature", 0.0, math.inf)
        self._check_float("top_p", 0.0, 1.0, open_low=True)
        self._check_int("top_k", -1)
        self._check_float("min_p", 0.0, 1.0)
        self._check_int("seed", None, optional=True)
        self._check_int("max_tokens", 1, optional=True)
        self._check_int("min_tokens", 0)
        self._check_int("logprobs", 0, optional=True)
        self._check_int("prompt_logprobs", 0, optional=True)
        self._check_float("presence_penalty", -2.0, 2.0)
        self._check_float("frequency_penalty", -2.0, 2.0)
        self._check_float("repetition_penalty", 0.0, math.inf, open_low=True)
        if not isinstance(self.ignore_eos, bool):
            raise self._bad("ignore_eos", "True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise self._bad("min_tokens", f"at most max_tokens ({self.max_tokens})")
        self._freeze_collections()

    def _freeze_collections(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple(self.stop)
        if stop is None or not all(isinstance(s, str) and s for s in stop):
            raise self._bad("stop", "a non-empty string or a list of them")
        object.__setattr__(self, "stop", stop)
        ids = _as_tuple(self.stop_token_ids)
        if ids is None or not all(_is_int(i) and i >= 0 for i in ids):
            raise self._bad("stop_token_ids", "a list of token ids (integers >= 0)")
        object.__setattr__(self, "stop_token_ids", ids)
        bias = self.logit_bias if self.logit_bias is not None else {}
        if not isinstance(bias, Mapping) or not all(
            _is_int(i) and i >= 0 and _is_number(b) and -100 <= b <= 100 for i, b in bias.items()
        ):
            raise self._bad("logit_bias", "a mapping from token ids (integers >= 0) to numbers in [-100, 100]")
        object.__setattr__(self, "logit_bias", {int(i): float(b) for i, b in bias.items()})

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is taken and nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """True where tokens that are already there change the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it is kept: a tuple."""
        return self.stop  # type: ignore[return-value]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`stop_token_ids` as they are kept: a tuple."""
        return self.stop_token_ids  # type: ignore[return-value]

    @property
    def bias(self) -> Mapping[int, float]:
        """`logit_bias` as it is kept: a mapping, perhaps empty."""
        return self.logit_bias  # type: ignore[return-value]

    def _check_int(self, name: str, low: int | None, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if not _is_int(value) or (low is not None and value < low):
            allowed = "an integer" if low is None else f"an integer >= {low}"
            raise self._bad(name, allowed + (" or None" if optional else ""))

    def _check_float(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        inside = _is_number(value) and low <= value <= high and not (open_low and value == low)
        if not inside:
            left, right = ("(" if open_low else "["), ("]" if math.isfinite(high) else ")")
            raise self._bad(name, f"a finite number in {left}{low:g}, {high:g}{right}")

    def _bad(self, name: str, allowed: str) -> ConfigError:
        return ConfigError(
            f"SamplingParams.{name}={getattr(self, name)!r} is not allowed",
            where=f"field {name!r} of SamplingParams",
            hint=f"give {allowed}",
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _as_tuple(value: Any) -> tuple[Any, ...] | None:
    """The value as a tuple: () for None, None for what is no list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else None
