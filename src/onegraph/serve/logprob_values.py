"""Log-probabilities as JSON can hold them: minus infinity has no number there."""

from __future__ import annotations

from onegraph.engine.outputs import Logprob

LEAST = -9999.0
"""What stands for the log-probability of a token that is impossible, as OpenAI's and vLLM's servers give it."""


def finite(entry: Logprob) -> float:
    """The log-probability, at least LEAST."""
    return max(entry.logprob, LEAST)
