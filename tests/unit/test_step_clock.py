"""The clock of profiles, on a time that stands still but where a test moves it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from onegraph.ir import step_clock
from onegraph.ir.artifact import PieceSource
from onegraph.ir.step_clock import StepClock


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def take(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def seconds(clock: StepClock) -> dict[tuple[str, ...], float]:
    return {span.path: pytest.approx(span.seconds) for span in clock.top.all()}


def test_spans_add_up_by_path_and_include_what_is_inside(time: Time) -> None:
    clock = StepClock()
    work = clock.wrap("work", lambda: time.take(2))
    for _ in range(3):
        with clock.step():
            time.take(1)
            work()
            work()
    assert seconds(clock) == {("step",): 15, ("step", "work"): 12}
    assert [span.num_calls for span in clock.top.all()] == [3, 6]
    assert [event.seconds for event in clock.events[:3]] == [2, 2, 5]


def test_what_stands_aside_is_counted_there_alone(time: Time) -> None:
    clock = StepClock()

    def model() -> None:
        time.take(1)
        clock.stand_in(lambda: clock.wrap("piece", lambda: time.take(5))())
        with clock.aside("replay"):
            time.take(3)

    with clock.step():
        clock.wrap("model", model)()
        time.take(1)
    assert seconds(clock) == {("step",): 7, ("step", "model"): 6, ("step", "model", "piece"): 5, ("replay",): 3}
    assert clock.stood_in_s == 5
    assert [event.span.name for event in clock.events if event.is_aside] == ["replay"]


def test_what_is_left_out_and_what_is_between_steps_is_counted_nowhere(time: Time) -> None:
    clock = StepClock()
    work = clock.wrap("work", lambda: time.take(2))
    work()
    with clock.step():
        with clock.left_out():
            work()
        work()
    assert seconds(clock) == {("step",): 2, ("step", "work"): 2}


def test_what_raises_leaves_no_span_open(time: Time) -> None:
    clock = StepClock()

    def fails() -> None:
        clock.enter("piece")
        clock.enter("kernel")
        time.take(1)
        raise ValueError

    for _ in range(2):
        with clock.step():
            with pytest.raises(ValueError):
                clock.wrap("model", fails)()
            clock.wrap("sampling", lambda: time.take(2))()
    assert seconds(clock)["step", "sampling"] == 4
    assert seconds(clock)["step", "model", "piece", "kernel"] == 2
    assert seconds(clock)["step",] == 6


def test_inside_of_a_whole_nothing_is_seen_or_waited_for(time: Time) -> None:
    waits: list[int] = []
    clock = StepClock(wait=lambda: waits.append(1))
    with clock.step():
        clock.wrap_whole("recording", clock.wrap("kernel", lambda: time.take(2)))()
    assert seconds(clock) == {("step",): 2, ("step", "recording"): 2}
    assert len(waits) == 2


def test_kernels_know_their_place_in_the_piece(time: Time) -> None:
    clock, source = StepClock(), PieceSource("", {})
    with clock.step():
        for _ in range(2):
            clock.enter("piece")
            for name in ("a", "b", "a"):
                clock.enter_kernel(name, source, f"own.{name}")
                clock.leave()
            clock.leave()
    piece = clock.top.inside["step"].inside["piece"]
    assert {name: sorted(site.number for site in span.sites) for name, span in piece.inside.items()} == {
        "a": [0, 2],
        "b": [1],
    }
    assert piece.inside["a"].num_calls == 4


def test_a_device_is_waited_for_at_the_end_of_each_span(time: Time) -> None:
    clock = StepClock(wait=lambda: time.take(4))
    with clock.step():
        clock.wrap("model", lambda: time.take(1))()
    assert seconds(clock) == {("step",): 9, ("step", "model"): 5}


def test_events_end_with_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_clock, "MAX_EVENTS", 3)
    clock: Any = StepClock()
    for _ in range(4):
        with clock.step():
            clock.wrap("model", lambda: None)()
    assert (len(clock.events), clock.num_left_out) == (4, 2)
