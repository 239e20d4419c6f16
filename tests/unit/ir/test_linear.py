"""Which choice a number of tokens goes by; choices as JSON and as text."""

from __future__ import annotations

import json

import pytest
import torch

from onegraph.ir.linear import TOKENS, LinearChoice, LinearShape, choice_index

SHAPE = LinearShape(24, 16, torch.bfloat16)
CHOICE = LinearChoice(SHAPE, ("vector",) * 2 + ("amx",) * 6 + ("plain",) * 2, ({"plain": 2e-6, "amx": 1e-6},) * 10, 24)


def test_a_number_of_tokens_goes_by_the_next_larger_one() -> None:
    expected = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 16: 16, 17: 32, 33: 64, 511: 512, 512: 512, 513: 512, 10**6: 512}
    assert {number: TOKENS[choice_index(number)] for number in expected} == expected


def test_choices_survive_json() -> None:
    assert LinearChoice.from_dict(json.loads(json.dumps(CHOICE.to_dict()))) == CHOICE


@pytest.mark.parametrize(
    "data", [{}, [], None, {**CHOICE.to_dict(), "dtype": "nn"}, {**CHOICE.to_dict(), "tokens": {"1": {}}}]
)
def test_other_json_is_refused(data: object) -> None:
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        LinearChoice.from_dict(data)  # type: ignore[arg-type]


def test_text() -> None:
    assert str(CHOICE) == "linear 16 -> 24, bfloat16, by tokens: vector up to 2, amx up to 128, plain from there on"
    unmeasured = LinearChoice(SHAPE, ("plain",) * 10, ({},) * 10, 0)
    assert str(unmeasured).endswith("by tokens: plain (by rule: the machine was too busy to measure)")


def test_the_digest_tells_shapes_and_machines_apart() -> None:
    digests = {
        SHAPE.digest({"threads": 1}),
        SHAPE.digest({"threads": 2}),
        LinearShape(16, 24, torch.bfloat16).digest({"threads": 1}),
        LinearShape(24, 16, torch.float32).digest({"threads": 1}),
    }
    assert len(digests) == 4
