"""asyncio's side of the engine's thread: jobs in, their outputs out, in the event loop.

Takes: prompts and parameters. Gives: a `Job`, which yields outputs as they come and frees everything when it is
closed. Keeps: how many sequences are in flight, so that a queue that is full is told at once. All methods are
called in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

from onegraph.config.engine import EngineConfig
from onegraph.engine.engine import EngineStats
from onegraph.engine.engine_thread import EngineThread, State
from onegraph.engine.outputs import RequestOutput
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.startup import Started, start_engine
from onegraph.engine.text import Text
from onegraph.errors import EngineError
from onegraph.serve.api_errors import ApiError, not_ready
from onegraph.serve.metrics import Metrics
from onegraph.serve.settings import ServeSettings

STEP_TIMEOUT_S = 30.0
"""How long the end of the engine's thread is waited for: a step ends soon."""
LOAD_TIMEOUT_S = 0.5
"""The same while the model is loaded and compiled, or a debugger waits for somebody, which may take minutes."""

T = TypeVar("T")


class Job:
    """The requests of one HTTP request: one for each prompt, each with `n` samples."""

    def __init__(self, client: EngineClient, n: int, deadline_s: float) -> None:
        self._client = client
        self._outputs: asyncio.Queue[tuple[int, RequestOutput] | ApiError] = asyncio.Queue()
        self._running: dict[str, int] = {}  # request id -> place of its prompt
        self._last_s: dict[str, float] = {}  # of requests that had an output
        self._num_tokens: Counter[str] = Counter()  # of a request's longest sample
        self._closed = False
        self._limit(deadline_s)
        self.arrived_s = time.monotonic()
        self.n = n

    def add(self, request_id: str, place: int) -> None:
        """Adds a request that was submitted."""
        self._running[request_id] = place

    def put(self, output: RequestOutput, now: float) -> None:
        """Takes an output of one of its requests, which came at `now`."""
        if self._closed:
            return
        self._outputs.put_nowait((self._running[output.request_id], output))
        self._measure(output, now)
        if output.finished:
            del self._running[output.request_id]

    def _measure(self, output: RequestOutput, now: float) -> None:
        metrics, name, times = self._client.metrics, output.request_id, output.metrics
        if times.first_token_s is None:
            return
        self._num_tokens[name] += max((len(sample.token_ids) for sample in output.outputs), default=0)
        if name in self._last_s:
            metrics.inter_token_s.observe(now - self._last_s[name])
        else:
            metrics.first_token_s.observe(times.first_token_s - self.arrived_s)
            metrics.cached_tokens.inc(times.num_cached_tokens)
        self._last_s[name] = now
        if output.finished and times.finished_s is not None:
            metrics.whole_s.observe(times.finished_s - self.arrived_s)
            if self._num_tokens[name] > 1:
                between = times.finished_s - times.first_token_s
                metrics.per_token_s.observe(between / (self._num_tokens[name] - 1))

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """The outputs with the place of their prompt, until all requests have ended.

        Raises ApiError for a request that failed, and when the job's time is over.
        """
        while self._running or not self._outputs.empty():
            item = await self._outputs.get()
            if isinstance(item, ApiError):
                raise item
            if item[1].error is not None:
                raise ApiError(500, item[1].error, code="engine_error")
            yield item

    def close(self) -> None:
        """Aborts what still runs; its blocks are free before the engine's next step."""
        self._closed = True
        self._timer.cancel()
        self._client.release(self._running, self.n)
        self._running.clear()

    def _limit(self, deadline_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(deadline_s, self._expire, deadline_s)

    def _expire(self, deadline_s: float) -> None:
        if self._client.thread.is_in_debugger:
            return self._limit(deadline_s)  # its time begins anew
        self._outputs.put_nowait(
            ApiError(504, f"the request wasn't done within {deadline_s:g} s (--request-timeout-s)")
        )


class EngineClient:
    """The engine as the endpoints see it."""

    def __init__(self, config: EngineConfig, settings: ServeSettings) -> None:
        self._settings = settings
        self._max_sequences = config.max_num_seqs + settings.max_queue
        self._num_sequences = 0
        self._jobs: dict[str, Job] = {}
        self._numbers = count()
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="onegraph-tokenizer")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        self._text: Text | None = None
        self.thread = EngineThread(lambda: start_engine(config), deliver=self._deliver, changed=self._tell)
        self.metrics = Metrics(self._facts)

    def start(self) -> None:
        """Starts the engine's thread, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    async def ready(self) -> Started:
        """Waits until requests are taken. Raises what starting raised."""
        while self.thread.state == "starting":
            await self._changed.wait()
            self._changed.clear()
        started = self.thread.wait_ready()
        # One of our own: a tokenizer isn't made for two threads at once.
        self._text = Text(copy.deepcopy(started.engine.text.tokenizer))
        return started

    @property
    def state(self) -> State:
        """The engine's; `ready` once requests are taken, and nothing is left to compile by then."""
        return "starting" if self.thread.state == "ready" and self._text is None else self.thread.state

    @property
    def num_requests(self) -> int:
        """Requests in flight, one for each prompt."""
        return len(self._jobs)

    @property
    def started(self) -> Started:
        """What was started. Raises ApiError (503) until it is there."""
        if self.thread.started is None or self._text is None:
            raise not_ready(self.state)
        return self.thread.started

    async def tokenized(self, work: Callable[[Text], T]) -> T:
        """Calls `work` with the tokenizer, in a thread of its own: a long prompt doesn't hold up the others."""
        text = self._text
        if text is None:
            raise not_ready(self.state)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, lambda: work(text))

    def submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, stream: bool) -> Job:
        """Queues one request for each prompt; close the job in any case.

        Raises ApiError when the queue is full or the engine isn't ready, ConfigError for what can't be served;
        nothing is left in the queue then.
        """
        if self.state != "ready":
            raise not_ready(self.state)
        wanted = len(prompts) * params.n
        if wanted > self._max_sequences:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n={params.n} are more than the {self._max_sequences} sequences that "
                "run and wait at most (--max-num-seqs and --max-queue)",
                param="prompt" if params.n == 1 else "n",
            )
        if self._num_sequences + wanted > self._max_sequences:
            raise ApiError(429, "the queue is full; try again later")
        job = Job(self, params.n, self._settings.request_timeout_s)
        try:
            for place, token_ids in enumerate(prompts):
                name = str(next(self._numbers))
                self.thread.submit(name, token_ids, params, stream=stream)
                self._num_sequences += params.n
                self._jobs[name] = job
                job.add(name, place)
                self.metrics.prompt_tokens.inc(len(token_ids))
        except EngineError as error:
            job.close()
            raise not_ready(self.state) from error
        except BaseException:
            job.close()
            raise
        return job

    def release(self, names: Sequence[str] | dict[str, int], n: int) -> None:
        """Aborts requests, and gives back their places in the queue."""
        for name in names:
            self.thread.abort(name)
            del self._jobs[name]
            self._num_sequences -= n

    async def stop(self) -> bool:
        """Ends the engine's thread, answering what is in flight with an error.

        False if it compiles, or is debugged, and can't end.
        """
        is_quick = self.thread.started is not None and not self.thread.is_in_debugger
        timeout_s = STEP_TIMEOUT_S if is_quick else LOAD_TIMEOUT_S
        ended = await asyncio.to_thread(self.thread.stop, timeout_s)
        self._loop = None
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        return ended

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Called in the engine's thread: one hand-over to the event loop for a whole step."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._route, outputs)

    def _route(self, outputs: list[RequestOutput]) -> None:
        now = time.monotonic()
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue  # its client has left
            job.put(output, now)
            if output.finished:
                del self._jobs[output.request_id]
                self._num_sequences -= job.n

    def _tell(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed.set)

    def _facts(self) -> tuple[str, EngineStats | None, str | None]:
        started = self.thread.started
        start = None if started is None else started.compiled.explain().start
        return self.thread.state, self.thread.stats, start
