"""When a sequence ends: stop tokens, stop strings across token borders, and lengths.

Takes: the tokens and the text of one sequence. Gives: the reason to stop, and how much text is safe to show
before.
"""

from dataclasses import dataclass

from onegraph.engine.outputs import FinishReason
from onegraph.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a sequence ended; `reason` is the stop string or stop token, None for the model's own end of
    text.
    """

    finish_reason: FinishReason
    reason: int | str | None = None


def stop_by_token(
    token_id: int, num_output_tokens: int, params: SamplingParams, eos_token_ids: frozenset[int]
) -> Stop | None:
    """The stop that a just generated token causes: end of text or one of the request's stop tokens."""
    if num_output_tokens < params.min_tokens:
        return None
    if token_id in eos_token_ids and not params.ignore_eos:
        return Stop("stop")
    return Stop("stop", token_id) if token_id in params.stop_ids else None


class StopStrings:
    """The stop strings of one request; looks only at text that it has not seen."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.strings = stop
        self._overlap = max((len(s) for s in stop), default=1) - 1
        self._from = 0  # a match starts here or later

    def ignore_until(self, length: int) -> None:
        """Text before this character can't be part of a match (it belongs to the first `min_tokens`
        tokens).
        """
        self._from = length

    def find(self, text: str) -> tuple[int, str] | None:
        """The first stop string in the text that grew since the last call: (index of its first character,
        itself).
        """
        found = [(at, stop) for stop in self.strings if (at := text.find(stop, self._from)) >= 0]
        if found:
            return min(found)
        self._from = max(self._from, len(text) - self._overlap)
        return None

    def num_held_back(self, text: str) -> int:
        """How many characters at the end may turn out to begin a stop string, and so must not be shown
        yet.
        """
        tail = text[max(self._from, len(text) - self._overlap) :]
        for start in range(len(tail)):
            if any(stop.startswith(tail[start:]) for stop in self.strings):
                return len(tail) - start
        return 0
