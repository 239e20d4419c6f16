"""The split of a step: parts add up to it."""

from __future__ import annotations

import time

import pytest

from bench.step_overhead import Clock, split_step


def test_parts_add_up_to_the_step() -> None:
    seconds = {
        "step": 0.100,
        "schedule": 0.001,
        "run": 0.092,
        "dispatch": 0.0005,
        "model": 0.090,
        "replay": 0.080,
        "sample": 0.003,
        "postprocess": 0.003,
        "detokenise": 0.001,
        "outputs": 0.0005,
    }
    split = split_step(seconds)
    parts = {part: ms for part, ms in split.items() if part not in ("step", "outside_replay", "share_outside_model")}
    assert sum(parts.values()) == pytest.approx(split["step"]) and min(parts.values()) > 0
    assert split["input_preparation"] == pytest.approx(1.5) and split["rest"] == pytest.approx(1.0)
    assert split["replay"] == pytest.approx(80.0) and split["outside_replay"] == pytest.approx(20.0)
    assert split["share_outside_model"] == pytest.approx(0.1)


def test_a_clock_adds_up_calls_also_of_those_that_raise() -> None:
    clock = Clock()
    wait = clock.wrap("wait", time.sleep)
    wait(0.01)
    wait(0.01)
    assert clock.seconds["wait"] >= 0.02
    with pytest.raises(ZeroDivisionError):
        clock.wrap("fails", lambda: 1 / 0)()
    assert clock.seconds["fails"] >= 0
