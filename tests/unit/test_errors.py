"""Errors are one readable block, with a stable code for each class and the nearest known name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onegraph import errors
from onegraph.errors import ConfigError, ConstraintError, OnegraphError, RecordingError, nearest

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, OnegraphError)]


def test_an_error_tells_what_where_and_what_to_do() -> None:
    text = str(ConfigError("backend='inductr'", where="-O.backend", hint="did you mean 'inductor'?"))
    assert text == "[OG-CONFIG] backend='inductr'\n  where: -O.backend\n  to do: did you mean 'inductor'?"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_one_block_of_three_parts(kind: type[OnegraphError]) -> None:
    error = kind("failed", where="here", hint="do that")
    assert str(error) == f"[{kind.code}] failed\n  where: here\n  to do: do that"
    assert (error.message, error.where, error.hint) == ("failed", "here", "do that")


def test_parts_that_are_not_given_leave_no_line() -> None:
    assert str(ConfigError("no")) == "[OG-CONFIG] no"


def test_codes_are_stable_and_differ() -> None:
    assert {c.__name__: c.code for c in CLASSES} == {
        "OnegraphError": "OG-ERROR",
        "ConfigError": "OG-CONFIG",
        "ModelError": "OG-MODEL",
        "InputContractError": "OG-INPUT",
        "ShapeOutOfRangeError": "OG-RANGE",
        "CaptureError": "OG-CAPTURE",
        "CustomOpError": "OG-CUSTOM-OP",
        "ConstraintError": "OG-CONSTRAINT",
        "StateChangedError": "OG-STATE",
        "CompileError": "OG-COMPILE",
        "ArtifactError": "OG-ARTIFACT",
        "RecordingError": "OG-RECORDING",
        "EngineError": "OG-ENGINE",
        "ServeError": "OG-SERVE",
        "TraceError": "OG-TRACE",
    }


def test_errors_carry_their_facts() -> None:
    assert ConstraintError("narrowed", constraints=("a", "b")).constraints == ("a", "b")
    assert RecordingError("moved", tensor="layers.0.weight").tensor == "layers.0.weight"


@pytest.mark.parametrize(
    ("word", "hint"),
    [("inductr", "did you mean 'inductor'?"), ("zzz", "known: aot_eager, eager, inductor")],
)
def test_nearest_names_one_or_all(word: str, hint: str) -> None:
    assert nearest(word, ("inductor", "aot_eager", "eager")) == hint


def test_nearest_does_not_list_hundreds() -> None:
    assert nearest("?", (f"name{i}" for i in range(200))) == "200 names are known"


@given(st.text())
def test_nearest_takes_any_word(word: str) -> None:
    assert nearest(word, ("inductor", "eager"))
