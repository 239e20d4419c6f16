"""A model's tokenizer as the engine uses it.

Takes: a transformers tokenizer, or None for a model without one. Gives: ids for text, text for ids, text for
a single token (kept, since log-probabilities ask for the same ones again and again).
"""

from collections.abc import Sequence
from typing import Any

from onegraph.errors import ConfigError, ModelError


class Text:
    """Text in and out; without a tokenizer all text is empty and prompts must be token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._single: dict[int, str] = {}
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        self.silent_ids = frozenset(i for i, token in added.items() if getattr(token, "special", False))
        """Special tokens, which `decode` leaves out."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens as the tokenizer adds them to a prompt. Errors: ConfigError
        without one.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "a text prompt was given, but the model has no tokenizer",
                where="the prompt",
                hint='give {"prompt_token_ids": [...]}',
            )
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return [int(i) for i in ids]

    def encode_chat(self, messages: Sequence[Any]) -> tuple[str, list[int]]:
        """A conversation as a prompt that the assistant continues: (text, ids). Errors: ModelError without a
        template, ConfigError for messages that the template refuses."""
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise ModelError(
                "the model has no chat template",
                where="chat",
                hint="use generate(), or a model whose tokenizer has a chat template",
            )
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it likes
            raise ConfigError(
                f"the chat template refuses the messages: {error}",
                where="chat",
                hint='give a list of {"role": ..., "content": ...} in an order that the model knows',
            ) from error
        return text, self.encode(text, add_special_tokens=False)  # the template wrote them

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        if self.tokenizer is None or not token_ids:
            return ""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token(self, token_id: int) -> str:
        """The text of one token alone, special ones too; part of a character shows as U+FFFD."""
        text = self._single.get(token_id)
        if text is None:
            text = "" if self.tokenizer is None else str(self.tokenizer.decode([token_id]))
            self._single[token_id] = text
        return text
