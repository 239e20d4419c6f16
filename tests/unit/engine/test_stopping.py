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
        safe, found = watch.let_through(piece)
        shown += safe
        assert text.startswith(shown)
        if expected is not None:
            assert (len(shown), found) == expected
            return
        assert found is None
        assert not any(shown.endswith(s[:n]) and text == shown for s in stops for n in range(1, len(s) + 1))
    assert shown + watch.rest() == text


def test_only_what_begins_a_stop_string_is_held_back():
    def shown(text: str) -> str:
        return StopStrings(("END", "\n\n")).let_through(text)[0]

    assert shown("text") == "text"
    assert shown("text E") == "text "
    assert shown("text EN") == "text "
    assert shown("text\n") == "text"
