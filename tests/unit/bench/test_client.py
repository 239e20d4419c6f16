"""The benchmark's client: events in pieces of any size, answers, and a small server over a real socket."""

from __future__ import annotations

import asyncio
import json
import random

import pytest

from bench.client import AnswerError, EventParser, Stream, completion_body, get_status, read_answer, run_clients

EVENTS = b'data: {"a": 1}\n\n: a comment\n\nevent: x\r\ndata:2\r\ndata: 3\r\n\r\ndata: [DONE]\n\n'
EXPECTED = [b'{"a": 1}', b"2\n3", b"[DONE]"]


def test_events_come_whole_from_pieces_of_any_size() -> None:
    assert EventParser().feed(EVENTS) == EXPECTED
    rng = random.Random(0)
    for _ in range(200):
        parser, found, rest = EventParser(), [], EVENTS
        while rest:
            size = rng.randint(1, 9)
            found += parser.feed(rest[:size])
            rest = rest[size:]
        assert found == EXPECTED


def test_an_event_is_given_when_it_ends() -> None:
    parser = EventParser()
    assert parser.feed(b"data: 1\n") == []
    assert parser.feed(b"\ndata: 2") == [b"1"]


def stream(*events: tuple[float, object]) -> Stream:
    return Stream(10.0, [(at, said if isinstance(said, bytes) else json.dumps(said).encode()) for at, said in events])


def text(words: str, finish_reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"text": words, "finish_reason": finish_reason}]}


USAGE = {"choices": [], "usage": {"completion_tokens": 5}}


def test_times_of_an_answer() -> None:
    events = [(10.1, text("")), (10.5, text("a")), (10.75, text("b c")), (11.5, text("d")), (12.5, text("", "length"))]
    answer = read_answer(stream(*events, (13.0, USAGE), (13.0, b"[DONE]")), 5)
    assert answer["ttft_ms"] == 500.0, "an event without text isn't a token that a user sees"
    assert answer["tpot_ms"] == 500.0, "2 s for the 4 tokens after the first, however many came in one event"
    assert answer["gaps_ms"] == [250.0, 750.0] and answer["tokens"] == 5


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (stream(), "DONE"),
        (stream((11.0, text("a")), (12.0, USAGE)), "DONE"),
        (stream((11.0, {"error": {"message": "no room"}}), (12.0, b"[DONE]")), "no room"),
        (stream((11.0, text("a")), (12.0, b"[DONE]")), "0 tokens"),
        (stream((11.0, text("")), (12.0, USAGE), (12.0, b"[DONE]")), "no event had text"),
    ],
)
def test_answers_that_are_not_what_was_asked_for(given: Stream, told: str) -> None:
    with pytest.raises(AnswerError, match=told):
        read_answer(given, 5)


async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers one request as a streaming server does, chunked, with events cut in two; 400 for a model `bad`."""
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"GET"):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    else:
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        if body["model"] == "bad":
            writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nno such model")
        else:
            said = [text("x")] * body["max_tokens"]
            said += [{"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}]
            whole = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in said) + b"data: [DONE]\n\n"
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for start in range(0, len(whole), 50):
                piece = whole[start : start + 50]
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


def test_requests_over_a_socket() -> None:
    async def run() -> None:
        server = await asyncio.start_server(answering, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        assert await get_status(port, "/v1/models") == 200
        streams, seconds = await run_clients(port, [completion_body("m", [1, 2], 7)] * 5, concurrency=2)
        answers = [read_answer(stream, 7) for stream in streams]
        assert len(answers) == 5 and all(len(answer["gaps_ms"]) == 6 for answer in answers) and seconds > 0
        with pytest.raises(ExceptionGroup) as failure:
            await run_clients(port, [completion_body("bad", [1], 7)], concurrency=1)
        assert "status 400: no such model" in str(failure.value.exceptions[0])
        server.close()
        await server.wait_closed()
        assert await get_status(port, "/v1/models") is None

    asyncio.run(run())


def test_a_request_is_for_exactly_so_many_greedy_tokens() -> None:
    body = json.loads(completion_body("m", [3, 4], 9))
    assert body["prompt"] == [3, 4] and body["max_tokens"] == 9 and body["ignore_eos"] and body["temperature"] == 0
    assert body["stream"] and body["stream_options"] == {"include_usage": True}
