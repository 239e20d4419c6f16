"""Stop tokens and stop strings."""

from hypothesis import given
from hypothesis import strategies as st

from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.stopping import Stop, StopStrings, stop_by_token


def test_stop_tokens():
    eos = frozenset({2})
    assert stop_by_token(2, 1, SamplingParams(), eos) == Stop("stop", None)
    assert stop_by_token(2, 1, SamplingParams(ignore_eos=True), eos) is None
    assert stop_by_token(5, 1, SamplingParams(stop_token_ids=[5]), eos) == Stop("stop", 5)
    assert stop_by_token(5, 2, SamplingParams(stop_token_ids=[5], min_tokens=3), eos) is None
    assert stop_by_token(5, 3, SamplingParams(stop_token_ids=[5], min_tokens=3), eos) == Stop("stop", 5)


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_piece_by_piece_equals_looking_at_all_prefixes(pieces: list[str], stops: list[str]):
    """A match is seen at the first piece that completes one; what was safe to show before never has to be
    taken back.
    """
    watch, text, shown = StopStrings(tuple(stops)), "", ""
    for piece in pieces:
        text += piece
        expected = min(((text.find(s), s) for s in stops if s in text), default=None)
        found = watch.find(text)
        assert found == expected
        if found is not None:
            assert text[: found[0]].startswith(shown)
            return
        safe = text[: len(text) - watch.num_held_back(text)]
        assert safe.startswith(shown)
        shown = safe
    assert not any(text.endswith(s[:n]) for s in stops for n in range(1, len(s) + 1)) or len(shown) < len(text)


def test_text_before_min_tokens_does_not_match():
    watch = StopStrings(("ab",))
    watch.ignore_until(1)
    assert watch.find("ab") is None
    assert watch.find("abab") == (2, "ab")


def test_only_a_suffix_that_begins_a_stop_string_is_held_back():
    watch = StopStrings(("END", "\n\n"))
    assert watch.num_held_back("text") == 0
    assert watch.num_held_back("text E") == 1
    assert watch.num_held_back("text EN") == 2
    assert watch.num_held_back("text\n") == 1
