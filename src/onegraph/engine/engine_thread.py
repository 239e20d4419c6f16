"""The engine in a thread of its own: it is loaded, compiled, warmed up and stepped there, and nowhere else.

Takes: a function that starts an engine; from any thread requests and aborts, at any moment. Gives: each step's
outputs in one call of `deliver`, in the engine's thread. Keeps: torch's settings as the starting thread had them,
and the promise that every request that was taken is answered: by its outputs, or by an error when its batch or
the engine itself fails, or when the engine is stopped.
"""

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from onegraph.build_trace import trace_timeline
from onegraph.engine.engine import Engine, EngineStats
from onegraph.engine.outputs import RequestOutput
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.startup import Started
from onegraph.engine.step_profile import StepProfiler
from onegraph.errors import EngineError, OnegraphError
from onegraph.ir.step_profile import StepProfile
from onegraph.log import get_logger
from onegraph.timeline import timeline
from onegraph.torch_compat.thread_state import ThreadState

log = get_logger(__name__)

State = Literal["starting", "ready", "draining", "stopped", "failed"]
Deliver = Callable[[list[RequestOutput]], None]
ProfileTold = Callable[[StepProfile | None], None]
"""Takes a profile; None where none could be made."""


@dataclass(frozen=True, slots=True)
class _Add:
    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    stream: bool


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(slots=True)
class _Profiling:
    """A profile of the next `num_steps` steps, or of those that there were when it `is_ended`."""

    num_steps: int
    told: ProfileTold
    is_begun: bool = False
    is_ended: bool = False


class EngineThread:
    """One engine and its thread.

    start: makes the engine. deliver: takes the outputs of a step; it must be quick, and is called in the thread.
    changed: told in the thread that `state` is another now. Both are told nothing more after `stop` has returned.
    """

    def __init__(
        self, start: Callable[[], Started], *, deliver: Deliver, changed: Callable[[], None] = lambda: None
    ) -> None:
        self._start_engine = start
        self._deliver = deliver
        self._changed = changed
        self._settings = ThreadState()
        self._thread = threading.Thread(target=self._run, name="onegraph-engine", daemon=True)
        self._wake = threading.Condition()
        self._commands: deque[_Add | _Abort] = deque()
        self._in_flight: set[str] = set()
        self._profiling: _Profiling | None = None
        self._settled = threading.Event()  # started, or failed to
        self._state: State = "starting"
        self._stopping = False
        self.started: Started | None = None
        self.error: BaseException | None = None
        """What ended the engine, where `state` is `failed`."""

    @property
    def state(self) -> State:
        """`starting`, `ready`, `draining` (takes no new requests), `stopped`, or `failed`."""
        return self._state

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_in_debugger(self) -> bool:
        """Whether it stands at a breakpoint of pdb's, or of a debugger made of pdb, where time is a person's."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        while frame is not None and frame.f_globals.get("__name__") not in ("bdb", "pdb"):
            frame = frame.f_back
        return frame is not None

    def start(self) -> None:
        """Starts the thread; returns at once."""
        self._thread.start()

    def wait_ready(self, timeout_s: float | None = None) -> Started:
        """Waits until requests are taken. Raises what starting raised, EngineError after `timeout_s`."""
        if not self._settled.wait(timeout_s):
            raise EngineError(f"the engine isn't ready after {timeout_s:g} s")
        if self.started is None:
            assert self.error is not None
            raise self.error
        return self.started

    @property
    def stats(self) -> EngineStats | None:
        """How busy the engine is, as it was a moment ago; None before it is ready."""
        return None if self.started is None else self.started.engine.stats

    def submit(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, *, stream: bool = False
    ) -> None:
        """Queues a request. Raises ConfigError for one that can't be served, EngineError unless `state` is ready."""
        if self.started is not None:
            self.started.engine.check_request(prompt_token_ids, params, where="the request")
        with self._wake:
            if self._state != "ready":
                raise EngineError(f"the engine is {self._state} and takes no requests")
            self._in_flight.add(request_id)
            self._commands.append(_Add(request_id, prompt_token_ids, params, stream))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request, if it still runs, and frees its blocks before the next step; it gets no more outputs."""
        with self._wake:
            if request_id in self._in_flight:
                self._in_flight.discard(request_id)
                self._commands.append(_Abort(request_id))
                self._wake.notify()

    def profile(self, num_steps: int, told: ProfileTold) -> Callable[[], None] | None:
        """Profiles the next steps; `told` gets the profile, once, in the thread. Gives a function that ends it early.

        It is made of the steps that there were then; draining ends it, too. None while another is made. Raises
        EngineError unless `state` is ready.
        """
        with self._wake:
            if self._state != "ready":
                raise EngineError(f"the engine is {self._state} and can't be profiled")
            if self._profiling is not None:
                return None
            asked = self._profiling = _Profiling(num_steps, told)
            self._wake.notify()

        def end() -> None:
            with self._wake:
                asked.is_ended = True
                self._wake.notify()

        return end

    def drain(self) -> None:
        """Takes no new requests from now on; those in flight go on."""
        with self._wake:
            if self._state == "ready":
                self._state = "draining"
            if self._profiling is not None:
                self._profiling.is_ended = True
                self._wake.notify()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """Answers what is in flight with an error and ends the thread; False if it hasn't ended after `timeout_s`.

        A thread that compiles can't be interrupted; it ends when that is done.
        """
        self.drain()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._settings.run(self._start_and_serve)
        except BaseException as error:  # noqa: BLE001 - the thread ends here, and with it the engine
            self._failed(error)
        finally:
            self._settled.set()

    def _start_and_serve(self) -> None:
        started = self._start_engine()
        with torch.inference_mode():
            started.engine.rehearse()
            timeline.is_ready()
            trace_timeline()
            with self._wake:
                self.started = started
                self._state = "ready"
            self._settled.set()
            self._changed()
            while self._obey(started.engine):
                if self._profiling is None:
                    self._step(started.engine, self._hand_over)
                else:
                    self._profile_steps(started.engine, self._profiling)
        self._answer_all("the server is shutting down")
        self._state = "stopped"
        self._changed()

    def _obey(self, engine: Engine) -> bool:
        """Waits until there is something to do, and takes in what was asked; False when the engine is to stop."""
        with self._wake:
            while not (self._commands or self._stopping or engine.has_unfinished() or self._profile_changes()):
                self._wake.wait()
            if self._stopping:
                return False
            commands, self._commands = self._commands, deque()
        refused = []
        for command in commands:
            if isinstance(command, _Abort):
                engine.abort(command.request_id)
            elif command.request_id in self._in_flight:
                try:
                    engine.queue_request(
                        command.request_id, command.prompt_token_ids, command.params, stream=command.stream
                    )
                except OnegraphError as error:
                    refused.append(_error_output(command.request_id, error.message))
        self._hand_over(refused)
        return True

    def _profile_changes(self) -> bool:
        """Whether a profile is to be begun or ended."""
        asked = self._profiling
        return asked is not None and (asked.is_ended or not asked.is_begun)

    def _step(self, engine: Engine, hand_over: Callable[[list[RequestOutput]], None]) -> None:
        result = engine.try_step()
        if result.failure is not None:
            log.error("a batch of %d requests failed: %s", len(result.outputs), _without_values(result.failure))
        hand_over(result.outputs)

    def _profile_steps(self, engine: Engine, asked: _Profiling) -> None:
        """Steps as ever, with timers, until the profile is done. Where that fails, nothing else does."""
        profiler, made = StepProfiler(engine), None
        asked.is_begun = True
        try:
            profiler.start()
        except Exception as error:  # noqa: BLE001 - as below; what was put in is out again
            log.error("no profile could be made: %s", _without_values(error))
            self._profiling = None
            asked.told(None)
            return
        try:
            hand_over = profiler.wrap("hand over", self._hand_over)
            while profiler.num_steps < asked.num_steps and not asked.is_ended and self._obey(engine):
                if engine.has_unfinished():
                    with profiler.step():
                        self._step(engine, hand_over)
        finally:
            try:
                profiler.stop()
                short = f"ended early: {asked.num_steps} steps were asked for"
                made = profiler.profile(*([short] if profiler.num_steps < asked.num_steps else []))
            except Exception as error:  # noqa: BLE001 - those who are served aren't to suffer from it
                log.error("no profile could be made: %s", _without_values(error))
            self._profiling = None
            asked.told(made)

    def _hand_over(self, outputs: list[RequestOutput]) -> None:
        """One call for a step; a request that was aborted in the meantime gets nothing."""
        with self._wake:
            outputs = [output for output in outputs if output.request_id in self._in_flight]
            self._in_flight.difference_update(output.request_id for output in outputs if output.finished)
        if outputs:
            self._deliver(outputs)

    def _failed(self, error: BaseException) -> None:
        """The engine itself failed: every request in flight is answered, and no other is taken."""
        if self.started is not None:  # a start that failed is told by who waits for it
            log.error("the engine failed: %s", _without_values(error))
        with self._wake:
            self.error = error
            self._state = "failed"
        self._answer_all(f"the engine failed: {type(error).__name__}")
        self._changed()

    def _answer_all(self, told: str) -> None:
        with self._wake:
            names = sorted(self._in_flight)
            profiling, self._profiling = self._profiling, None
        if profiling is not None:
            profiling.told(None)
        self._hand_over([_error_output(name, told) for name in names])


def _error_output(request_id: str, error: str) -> RequestOutput:
    return RequestOutput(request_id, None, (), [], finished=True, error=error)


def _without_values(error: BaseException) -> str:
    """An error's type and where it was raised: its message may hold a prompt, which no log shows."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return type(error).__name__ + "".join(f" < {frame.filename}:{frame.lineno}" for frame in reversed(frames))
