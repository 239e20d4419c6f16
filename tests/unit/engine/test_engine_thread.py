"""The engine's thread around a fake model: its settings, and that everything that is taken is answered."""

from __future__ import annotations

import io
import os
import pdb
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fake_model import FakeModel, expected_tokens, make_engine

from onegraph.engine.engine_thread import EngineThread
from onegraph.engine.outputs import RequestOutput
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.step_profile import StepProfiler
from onegraph.errors import ConfigError, EngineError
from onegraph.ir.step_profile import StepProfile


class Answers:
    """What the thread delivers, and in how many calls."""

    def __init__(self) -> None:
        self.calls: list[list[RequestOutput]] = []
        self.finished: dict[str, RequestOutput] = {}
        self._arrived = threading.Condition()

    def __call__(self, outputs: list[RequestOutput]) -> None:
        with self._arrived:
            self.calls.append(outputs)
            self.finished.update({output.request_id: output for output in outputs if output.finished})
            self._arrived.notify_all()

    def wait(self, *names: str) -> list[RequestOutput]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: set(names) <= set(self.finished), 30)
        return [self.finished[name] for name in names]


@contextmanager
def running(**settings: Any) -> Iterator[tuple[EngineThread, Answers, FakeModel]]:
    engine, model = make_engine(**settings)
    answers = Answers()
    thread = EngineThread(lambda: SimpleNamespace(engine=engine), deliver=answers)  # type: ignore[arg-type, return-value]
    thread.start()
    thread.wait_ready(30)
    try:
        yield thread, answers, model
    finally:
        assert thread.stop()


def greedy(max_tokens: int = 8, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **params)


def all_free(thread: EngineThread) -> bool:
    stats = thread.stats
    assert stats is not None
    return stats.num_free_blocks == stats.num_blocks and not stats.num_running and not stats.num_waiting


def test_requests_are_answered_and_one_call_delivers_a_step() -> None:
    with running() as (thread, answers, _):
        for name in "abc":
            thread.submit(name, [1, 2, ord(name) % 7], greedy(), stream=name != "c")
        for name, output in zip("abc", answers.wait(*"abc"), strict=True):
            got = [
                i for call in answers.calls for one in call if one.request_id == name for i in one.outputs[0].token_ids
            ]
            assert got == expected_tokens([1, 2, ord(name) % 7], 8) and output.error is None
        assert 8 <= len(answers.calls) <= 8 + 3
        assert all_free(thread)


def test_torchs_settings_are_those_of_the_starting_thread() -> None:
    seen: dict[str, Any] = {}

    def start() -> Any:
        engine, model = make_engine()

        def look(inputs: object) -> None:
            seen.update(
                inference=torch.is_inference_mode_enabled(),
                threads=torch.get_num_threads(),
                cache_limit=torch._dynamo.config.recompile_limit,
                device=torch.get_default_device(),
                thread=threading.current_thread(),
            )

        model.before_call = look
        seen["grad at the start"] = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return SimpleNamespace(engine=engine)

    import torch._dynamo.config

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch._dynamo.config.patch(recompile_limit=77):
            thread = EngineThread(start, deliver=Answers())
    finally:
        torch.set_num_threads(before)
    thread.start()
    thread.wait_ready(30)
    assert thread.stop()
    torch.set_num_threads(before)  # torch's number for threads that have none of their own
    assert seen.pop("thread") is not threading.current_thread()
    assert seen == {
        "grad at the start": True,
        "inference": True,
        "threads": 3,
        "cache_limit": 77,
        "device": torch.device("cpu"),
    }


def test_what_can_not_be_served_comes_back_to_the_caller() -> None:
    with running() as (thread, answers, _):
        with pytest.raises(ConfigError, match="no tokens"):
            thread.submit("a", [], greedy())
        thread.submit("b", [1], greedy(2))
        answers.wait("b")
        assert list(answers.finished) == ["b"]


def test_an_abort_frees_blocks_and_gives_no_more_outputs() -> None:
    with running() as (thread, answers, model):
        go_on, ran = threading.Event(), threading.Event()

        def hold(inputs: object) -> None:
            ran.set()
            go_on.wait(30)

        model.before_call = hold
        thread.submit("a", [1, 2, 3], greedy(40), stream=True)
        assert ran.wait(30)
        thread.abort("a")
        thread.abort("never there")
        go_on.set()
        thread.submit("b", [1], greedy(2))
        answers.wait("b")
        assert all_free(thread)
        assert {output.request_id for call in answers.calls for output in call} == {"b"}


def test_a_batch_that_fails_is_answered_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with running(max_num_seqs=1) as (thread, answers, model):

        def fail(inputs: object) -> None:
            raise RuntimeError("secret")

        model.before_call = fail
        thread.submit("a", [1], greedy())
        assert answers.wait("a")[0].error == "the batch failed: RuntimeError"
        model.before_call = lambda inputs: None
        thread.submit("b", [1], greedy())
        assert answers.wait("b")[0].error is None
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text


def test_an_engine_that_fails_answers_everything_and_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    engine, _ = make_engine()
    answers = Answers()
    thread = EngineThread(
        lambda: SimpleNamespace(engine=engine),  # type: ignore[arg-type, return-value]
        deliver=answers,
        changed=lambda: told.append(thread.state),
    )
    thread.start()
    thread.wait_ready(30)

    def broken() -> Any:
        raise AssertionError("broken")

    monkeypatch.setattr(engine, "try_step", broken)
    with thread._wake:  # all of them are there before the next step
        for name in "abc":
            thread.submit(name, [1], greedy())
    assert [output.error for output in answers.wait(*"abc")] == ["the engine failed: AssertionError"] * 3
    thread._thread.join(30)
    assert thread.state == "failed" and told == ["ready", "failed"] and isinstance(thread.error, AssertionError)
    with pytest.raises(EngineError, match="failed"):
        thread.submit("d", [1], greedy())


def test_a_start_that_fails_is_raised_to_who_waits() -> None:
    def start() -> Any:
        raise ConfigError("no such thing")

    thread = EngineThread(start, deliver=Answers())
    thread.start()
    with pytest.raises(ConfigError, match="no such thing"):
        thread.wait_ready(30)
    assert thread.state == "failed" and thread.stop()


def test_draining_takes_nothing_new_and_stopping_answers_the_rest() -> None:
    with running() as (thread, answers, model):
        ran, go_on = threading.Event(), threading.Event()

        def hold(inputs: object) -> None:
            ran.set()
            go_on.wait(30)

        model.before_call = hold
        thread.submit("a", [1], greedy(40))
        assert ran.wait(30)
        thread.drain()
        with pytest.raises(EngineError, match="draining"):
            thread.submit("b", [1], greedy())
        stopper = threading.Timer(0.1, go_on.set)
        stopper.start()
        assert thread.stop()
        assert answers.wait("a")[0].error == "the server is shutting down"
        assert thread.state == "stopped"


def test_waiting_for_an_engine_that_is_not_ready_ends() -> None:
    load = threading.Event()

    def start() -> Any:
        load.wait(30)
        return SimpleNamespace(engine=make_engine()[0])

    thread = EngineThread(start, deliver=Answers())
    thread.start()
    with pytest.raises(EngineError, match="starting"):
        thread.submit("a", [1], greedy())
    with pytest.raises(EngineError, match="after 0.05 s"):
        thread.wait_ready(0.05)
    assert not thread.stop(0.05)
    load.set()
    assert thread.stop()


def test_it_says_that_it_stands_at_a_breakpoint() -> None:
    reader, writer = os.pipe()
    engine, _ = make_engine()
    answers = Answers()
    with open(reader) as typed, open(writer, "w") as keyboard:

        def deliver(outputs: list[RequestOutput]) -> None:
            pdb.Pdb(stdin=typed, stdout=io.StringIO(), nosigint=True).set_trace()
            answers(outputs)

        thread = EngineThread(lambda: SimpleNamespace(engine=engine), deliver=deliver)  # type: ignore[arg-type, return-value]
        assert not thread.is_in_debugger
        thread.start()
        thread.wait_ready(30)
        assert not thread.is_in_debugger
        thread.submit("a", [1, 2, 3], greedy(2))
        until = time.monotonic() + 30
        while not thread.is_in_debugger and time.monotonic() < until:
            time.sleep(0.01)
        assert thread.is_in_debugger
        keyboard.write("c\n")
        keyboard.flush()
        answers.wait("a")
        assert not thread.is_in_debugger
        assert thread.stop()


def test_a_profile_that_cannot_begin_costs_nobody_else_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(profiler: StepProfiler) -> None:
        raise RuntimeError("no timers")

    monkeypatch.setattr(StepProfiler, "start", fails)
    told: queue.Queue[StepProfile | None] = queue.Queue()
    with running() as (thread, answers, _):
        for name in "ab":
            assert thread.profile(3, told.put) is not None
            assert told.get(timeout=30) is None
            thread.submit(name, [1, 2], greedy())
            (output,) = answers.wait(name)
            assert list(output.outputs[0].token_ids) == expected_tokens([1, 2], 8) and thread.state == "ready"
