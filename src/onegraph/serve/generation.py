"""What both endpoints share: a job's outputs as one answer or as a stream of events, and clients that hang up.

Takes: a job, and a `Form` that writes an endpoint's objects. Gives: an HTTP response. Keeps: the promise that a job
is closed, and its blocks are free, as soon as its answer has ended or its client has left.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from onegraph.engine.outputs import CompletionOutput, RequestOutput
from onegraph.serve.answers import PromptTokensDetails, Usage
from onegraph.serve.api_errors import ApiError, internal, log_unexpected
from onegraph.serve.engine_client import Job
from onegraph.serve.metrics import Metrics

CLIENT_CLOSED_REQUEST = 499
"""The status of an answer that nobody waits for any more; no client ever sees it."""


class Form(ABC):
    """Writes the objects of one endpoint for one request; counts tokens on the way."""

    endpoint: str

    def __init__(self, prefix: str, model: str, *, n: int, prompt_tokens: int) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.n = n
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}

    @abstractmethod
    def chunks(self, index: int, sample: CompletionOutput) -> list[BaseModel]:
        """What a stream shows of a sample's new tokens."""

    @abstractmethod
    def usage_chunk(self) -> BaseModel:
        """The chunk without choices that ends a stream whose client wants usage."""

    @abstractmethod
    def whole(self, samples: dict[int, CompletionOutput]) -> BaseModel:
        """The answer that isn't streamed."""

    def count(self, place: int, output: RequestOutput) -> None:
        """Counts an output's tokens."""
        self._completion_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        self._cached[place] = output.metrics.num_cached_tokens

    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=self._prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )


async def answer_whole(request: Request, job: Job, form: Form, metrics: Metrics) -> Response:
    """Waits for all of it; a client that hangs up meanwhile ends the job."""
    collecting = asyncio.ensure_future(_collected(job, form, metrics))
    leaving = asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            metrics.hung_up.inc()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Response(form.whole(collecting.result()).model_dump_json(), media_type="application/json")
    finally:
        job.close()
        for task in (collecting, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await task


def answer_stream(job: Job, form: Form, metrics: Metrics, *, include_usage: bool) -> Response:
    """Server-sent events, one for each step of each sample."""
    return _EventStream(_events(job, form, metrics, include_usage), job.close, metrics.hung_up.inc)


class _EventStream(StreamingResponse):
    """A stream that tells when it is over, however that comes about."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], hung_up: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._until_the_end(events), media_type="text/event-stream", headers=headers)
        self._close = close
        self._hung_up = hung_up
        self._complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
            if not self._complete:
                self._hung_up()

    async def _until_the_end(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for event in events:
            yield event
        self._complete = True


async def _events(job: Job, form: Form, metrics: Metrics, include_usage: bool) -> AsyncIterator[bytes]:
    try:
        async for place, output in job.outputs():
            form.count(place, output)
            for sample in output.outputs:
                _ended(sample, form, metrics)
                for chunk in form.chunks(place * form.n + sample.index, sample):
                    yield _event(chunk.model_dump_json())
        if include_usage:
            yield _event(form.usage_chunk().model_dump_json())
    except ApiError as error:
        metrics.errors.labels(form.endpoint, error.status).inc()
        yield _event(json.dumps(error.body()))
    except Exception as error:  # noqa: BLE001 - the status is sent already: the stream itself has to tell
        log_unexpected(error)
        metrics.errors.labels(form.endpoint, 500).inc()
        yield _event(json.dumps(internal(error).body()))
    yield _event("[DONE]")


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


async def _collected(job: Job, form: Form, metrics: Metrics) -> dict[int, CompletionOutput]:
    samples: dict[int, CompletionOutput] = {}
    async for place, output in job.outputs():
        form.count(place, output)
        for sample in output.outputs:
            _ended(sample, form, metrics)
            samples[place * form.n + sample.index] = sample
    return samples


def _ended(sample: CompletionOutput, form: Form, metrics: Metrics) -> None:
    if sample.finish_reason is not None:
        metrics.requests.labels(form.endpoint, sample.finish_reason).inc()


async def hung_up(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
