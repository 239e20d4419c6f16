"""Incremental text: never half a character, only growing, and at the end what decoding everything gives."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onegraph.engine.detokenizer import Detokenizer
from onegraph.engine.text import Text

SPECIAL = "<|end|>"


def byte_level() -> PreTrainedTokenizerFast:
    """One token a byte, and a special one: every character beyond ASCII is split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL]})
    return fast


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: words with a leading ▁, bytes for what no word covers, and a text's first space
    dropped.
    """
    words = ["▁the", "▁a", "b", "c", "▁", "ü", "."]
    vocab = {w: i for i, w in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": [SPECIAL]})
    return fast


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


def stream(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> tuple[list[str], str]:
    """The pieces that come token by token, and the whole."""
    detokenizer = Detokenizer(Text(tokenizer).decode)
    pieces = [detokenizer.append(i) for i in token_ids]
    pieces.append(detokenizer.finish(token_ids))
    assert "".join(pieces) == detokenizer.text
    return pieces, tokenizer.decode(token_ids, skip_special_tokens=True)


@settings(deadline=None)
@given(text=st.text(max_size=20), cuts=st.sets(st.integers(0, 40)))
def test_any_text_byte_by_byte_with_special_tokens_between(text: str, cuts: set[int]):
    ids: list[int] = []
    for at, char in enumerate(text):
        if at in cuts:
            ids += BYTE_LEVEL.convert_tokens_to_ids([SPECIAL])
        ids += BYTE_LEVEL(char)["input_ids"]
    pieces, whole = stream(BYTE_LEVEL, ids)
    assert "".join(pieces) == whole == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=24))
def test_any_byte_tokens_even_invalid_ones(ids: list[int]):
    pieces, whole = stream(BYTE_LEVEL, ids)
    assert "".join(pieces) == whole
    assert not any(piece.endswith("�") for piece in pieces[:-1])


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 6), max_size=24))
def test_words_with_leading_spaces(ids: list[int]):
    pieces, whole = stream(BYTE_FALLBACK, ids)
    assert "".join(pieces) == whole


@settings(deadline=None)
@given(text=st.text("b ü.€😀c", max_size=12))
def test_byte_fallback_of_valid_text(text: str):
    ids = []
    for char in text:
        token = {" ": "▁", "ü": "ü", ".": ".", "b": "b", "c": "c"}.get(char)
        names = [token] if token else [f"<0x{b:02X}>" for b in char.encode()]
        ids += BYTE_FALLBACK.convert_tokens_to_ids(names)
    pieces, whole = stream(BYTE_FALLBACK, ids)
    assert "".join(pieces) == whole
    assert not any("�" in piece for piece in pieces)


def test_a_decoder_that_takes_back_its_text_does_not_take_back_ours():
    """Byte fallback makes a whole run of bytes invalid when its last one is: what was shown stays."""
    ids = BYTE_FALLBACK.convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>"])
    pieces, _ = stream(BYTE_FALLBACK, ids)
    assert "".join(pieces[:3]) == "€"
    assert "".join(pieces).startswith("€")


@pytest.mark.parametrize("cut", range(4))
def test_an_unfinished_character_at_the_end_shows_once_as_replacement(cut: int):
    ids = BYTE_LEVEL("ab😀")["input_ids"][: 2 + cut]
    pieces, whole = stream(BYTE_LEVEL, ids)
    assert "".join(pieces[:-1]) == "ab"
    assert "".join(pieces) == whole == ("ab�" if cut else "ab")
