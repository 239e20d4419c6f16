"""Turns one sequence's tokens into text as they come, never showing half a character.

Takes: token ids, one or many at a time, and a function that decodes a list of them. Gives: text that only
grows, and at the end equals decoding all tokens at once. A token may hold part of a UTF-8 character, and a
token's text depends on its neighbours (a leading space is dropped at a text's start), so a window of the last
tokens is decoded again and what it adds is taken; text that ends in U+FFFD waits for the tokens that complete
it.
Method: the two offsets of text-generation-inference's and vLLM's incremental decoding, written afresh.
"""

from collections.abc import Callable, Collection, Sequence

REPLACEMENT = "�"
Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """The text of one sequence. `silent` are tokens without a text: they never reach a window.

    A run of them would otherwise be decoded again with every token that follows.
    """

    def __init__(self, decode: Decode, silent: Collection[int] = ()) -> None:
        self._decode = decode
        self._silent = silent
        self._token_ids: list[int] = []
        self._window = 0  # first token of the window
        self._shown = 0  # tokens before this one are in the text
        self._window_text = ""  # of the tokens from _window to _shown
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self._pieces)

    def append(self, token_id: int) -> str:
        """Adds a token; gives the text that it adds, perhaps none yet."""
        if token_id in self._silent:
            return ""
        self._token_ids.append(token_id)
        window_text = self._decode(self._token_ids[self._window :])
        if len(window_text) <= len(self._window_text) or window_text.endswith(REPLACEMENT):
            return ""
        added = window_text[len(self._window_text) :]
        self._pieces.append(added)
        self._window, self._shown = self._shown, len(self._token_ids)
        self._window_text = self._decode(self._token_ids[self._window :])
        return added

    def finish(self, token_ids: Sequence[int]) -> str:
        """Ends the sequence with exactly these tokens; gives the text that is still to add.

        Where a decoder takes back what it decoded before (byte fallback, when later bytes make earlier ones
        invalid), text already shown stays and only the rest of the window is added.
        """
        self._token_ids = [i for i in token_ids if i not in self._silent]
        whole, text = self._decode(self._token_ids), self.text
        if whole.startswith(text):
            added = whole[len(text) :]
        else:
            added = self._decode(self._token_ids[self._window :])[len(self._window_text) :]
        self._pieces.append(added)
        return added
