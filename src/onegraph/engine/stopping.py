"""When a sequence ends: stop tokens, stop strings across token borders, and lengths.

Takes: the tokens and the text of one sequence. Gives: the reason to stop, and the text that is safe to show.
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
    """Lets the text of one sequence through, piece by piece, up to the first of its stop strings.

    The end of the text so far that may turn out to begin a stop string is held back, and looked at again with the
    next piece: what was let through never has to be taken back, and nothing is searched twice.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.strings = stop
        self._held = ""

    def let_through(self, piece: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that ends it here, if one does.

        Of several stop strings the one that begins first counts, and of those the first in order.
        """
        text = self._held + piece
        found = [(at, stop) for stop in self.strings if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return text[:at], stop
        num_held = self._num_held_back(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def rest(self) -> str:
        """The text that was held back, for a sequence that ends without its stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held_back(self, text: str) -> int:
        return max((_num_begun(stop, text) for stop in self.strings), default=0)


def _num_begun(stop: str, text: str) -> int:
    """How many characters at the text's end are the longest proper beginning of a stop string."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
