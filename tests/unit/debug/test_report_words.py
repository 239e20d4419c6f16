"""How the report writes numbers, commands and places."""

from __future__ import annotations

import pytest

from onegraph.debug import report_words as words
from onegraph.debug.svg_element import element
from onegraph.debug.svg_timeline import timeline_axis, timeline_rows


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "–"),
        (0, "0 s"),
        (2e-9, "2 ns"),
        (4.2e-5, "42 µs"),
        (0.5, "500 ms"),
        (6.26, "6.26 s"),
        (1234.5, "1,234 s"),
    ],
)
def test_seconds(value: float | None, told: str) -> None:
    assert words.seconds(value) == told


@pytest.mark.parametrize(
    ("value", "told"), [(0, "0 bytes"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB"), (2**42, "4,096 GiB")]
)
def test_sizes_in_memory(value: int, told: str) -> None:
    assert words.size(value) == told


@pytest.mark.parametrize(
    ("numbers", "told"),
    [([3], "3"), (range(1, 17), "1..16"), (range(2, 120, 2), "2, 4, …, 118"), ([1, 2, 4, 8, 16], "1, 2, 4, 8, 16")],
)
def test_runs_of_numbers(numbers: list[int], told: str) -> None:
    assert words.runs(list(numbers)) == told


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["/x/python", "-P", "-m", "onegraph.cli.main", "run", "--prompt", "def "], "onegraph run --prompt 'def '"),
        (["/x/python", "/x/bin/onegraph", "serve", "m"], "onegraph serve m"),
        (["/x/python", "script.py"], "python script.py"),
        ([], ""),
    ],
)
def test_a_command_as_it_is_typed(command: list[str], told: str) -> None:
    assert words.command_line(command) == told


def test_all_of_an_element_is_escaped() -> None:
    assert element("a", "<b>", href='"x', data_of=None) == '<a href="&#34;x">&lt;b&gt;</a>'
    assert words.breakable("a/<b>") == "a/<wbr>&lt;b&gt;"


def test_the_timeline_of_many_pieces() -> None:
    """The slowest have a row each, right below the stage that they are in; the others share one."""
    events = [{"name": "compile or load", "start_s": 1.0, "seconds": 90.0, "detail": ""}]
    events += [{"name": f"piece {n}", "start_s": 1.0 + n, "seconds": float(n), "detail": "lower"} for n in range(1, 14)]
    events.append({"name": "first token", "start_s": 95.0, "seconds": 0.0, "detail": ""})
    timeline = {"events": events, "ready_s": 94.0, "first_token_s": 95.0}
    rows = timeline_rows(timeline)
    assert rows[0].label == "compile or load"
    assert [row.label for row in rows[1:-1]] == [*(f"piece {n}" for n in range(5, 14)), "4 other pieces"]
    assert rows[-2].seconds == 1 + 2 + 3 + 4
    assert rows[-1].label == "first token"
    assert [text in timeline_axis(timeline) for text in (">0 s<", ">80 s<")] == [True, True]
