"""The switches as they are typed are those that are measured, and ratios are taken round by round."""

from __future__ import annotations

import pytest

from bench.switches import AS_IT_IS, SWITCHES, ratios
from onegraph.cli.flags import split_compilation_words
from onegraph.config.compilation import CompilationConfig


@pytest.mark.parametrize("typed", [name for name in SWITCHES if name.startswith("-O")])
def test_what_is_typed_is_what_is_measured(typed: str) -> None:
    rest, fields = split_compilation_words([typed])
    assert rest == [] and CompilationConfig.of(fields) == CompilationConfig.of(SWITCHES[typed]["compilation_config"])


def test_a_ratio_is_that_of_one_round() -> None:
    assert SWITCHES[AS_IT_IS] == {}
    found = ratios([100.0, 50.0, 10.0], [50.0, 25.0, 6.0])
    assert (found["median"], found["min"], found["max"]) == (0.5, 0.5, 0.6)
