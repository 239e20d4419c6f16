"""A light streaming client for /v1/completions: raw HTTP/1.1 over asyncio, one connection for each request.

It shares its cores with the server that it measures. So it keeps what comes with the time at which it came, and
reads the JSON when the level is over.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

HOST = "127.0.0.1"
MAX_ERROR_BYTES = 4096


class AnswerError(Exception):
    """The server's answer isn't what was asked for; the message says what came."""


class EventParser:
    """Server-sent events from bytes in pieces of any size; gives the data of each event that is complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that end in this piece."""
        events: list[bytes] = []
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return events  # other lines are comments and fields that mean nothing here


@dataclass
class Stream:
    """What came for one request: when it was sent, and each event with the time at which it came (seconds)."""

    sent_s: float
    events: list[tuple[float, bytes]] = field(default_factory=list)


async def read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the body is chunked)."""
    status_line, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    chunked = any(header.lower().replace(" ", "") == "transfer-encoding:chunked" for header in headers)
    return int(status_line.split()[1]), chunked


async def read_piece(reader: asyncio.StreamReader, chunked: bool) -> bytes:
    """The next piece of the body, empty at its end."""
    if not chunked:
        return await reader.read(65536)
    size = int((await reader.readline()).split(b";")[0] or b"0", 16)
    return (await reader.readexactly(size + 2))[:size]


async def get_status(port: int, path: str) -> int | None:
    """The status of a GET, None where nobody listens or answers."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n\r\n".encode())
            return (await asyncio.wait_for(read_head(reader), 5))[0]
        finally:
            writer.close()
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        return None


async def stream_completion(port: int, body: bytes) -> Stream:
    """Sends a completion request and reads its events to the end. Raises AnswerError for a status other than 200."""
    stream = Stream(time.perf_counter())
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status, chunked = await read_head(reader)
        if status != 200:
            text = (await reader.read(MAX_ERROR_BYTES)).decode(errors="replace")
            raise AnswerError(f"status {status}: {' '.join(text.split())[:200]}")
        parser = EventParser()
        while piece := await read_piece(reader, chunked):
            now = time.perf_counter()
            stream.events += [(now, event) for event in parser.feed(piece)]
        return stream
    finally:
        writer.close()


def completion_body(model: str, prompt: list[int], num_tokens: int) -> bytes:
    """A greedy streaming request for exactly so many tokens, with token ids as its prompt."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def read_answer(stream: Stream, num_tokens: int) -> dict[str, Any]:
    """Tokens, ms to the first text, ms for each token after it, and the gaps between events with text.

    Raises AnswerError for an error event, a stream without its end, or another number of tokens than was asked for.
    """
    if not stream.events or stream.events[-1][1] != b"[DONE]":
        raise AnswerError("the stream ended without [DONE]")
    times: list[float] = []
    last_s, tokens = stream.sent_s, 0
    for at_s, event in stream.events[:-1]:
        said = json.loads(event)
        if "error" in said:
            raise AnswerError(f"an error event: {str(said['error'])[:200]}")
        if said.get("usage"):
            tokens = said["usage"]["completion_tokens"]
        for choice in said.get("choices", []):
            if choice.get("text"):
                times.append(at_s)
            if choice.get("text") or choice.get("finish_reason"):
                last_s = at_s
    if tokens != num_tokens:
        raise AnswerError(f"{tokens} tokens came, where {num_tokens} were asked for")
    if not times:
        raise AnswerError("no event had text")
    return {
        "tokens": tokens,
        "ttft_ms": 1000 * (times[0] - stream.sent_s),
        "tpot_ms": 1000 * (last_s - times[0]) / max(tokens - 1, 1),
        "gaps_ms": [1000 * (after - before) for before, after in pairwise(times)],
    }


async def run_clients(port: int, bodies: list[bytes], concurrency: int) -> tuple[list[Stream], float]:
    """Sends all requests, `concurrency` at a time; gives the streams and the seconds from first to last."""
    waiting = list(reversed(bodies))
    streams: list[Stream] = []

    async def client() -> None:
        while waiting:
            streams.append(await stream_completion(port, waiting.pop()))

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return streams, time.perf_counter() - began
