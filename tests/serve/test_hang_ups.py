"""A client that leaves frees its blocks at once, whatever it asked for."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from onegraph import LLM, SamplingParams
from tests.serve.live_server import Live, live, wait_until

LONG = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}


def test_64_streams_of_which_a_third_hang_up(model_folder: Path, llm: LLM) -> None:
    prompts = [f"stream number {number}" for number in range(64)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]

    async def stream(client: openai.AsyncOpenAI, number: int) -> str | None:
        answer = await client.completions.create(
            model="tiny",
            prompt=prompts[number],
            max_tokens=40,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text = ""
        async with answer:
            async for chunk in answer:
                text += chunk.choices[0].text
                if number % 3 == 0 and len(text) >= number % 7:
                    return None
        return text

    async def all_streams(url: str) -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(stream(client, number) for number in range(64)))

    with live(model_folder, engine={"max_num_seqs": 24}) as one:
        texts = asyncio.run(all_streams(one.url))
        left = [number for number, text in enumerate(texts) if text is None]
        assert left == list(range(0, 64, 3))
        assert all(texts[number] == expected[number] for number in range(64) if number % 3)
        wait_until(one.is_empty)
        assert one.server.client.num_requests == 0 and one.server.client._num_sequences == 0
        assert one.metrics()["onegraph_client_disconnects_total"] == len(left)


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["a", "b"]}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_a_hang_up_ends_the_request(fields: dict[str, Any], stream: bool, model_folder: Path) -> None:
    """The engine is so slow that the answer would take minutes: only the hang-up can end it."""
    with live(model_folder) as one:
        step, pause = one.engine.try_step, threading.Event()

        def slow() -> Any:
            pause.wait(0.3)
            return step()

        one.engine.try_step = slow  # type: ignore[method-assign]
        body = {"prompt": "hello", **LONG, "stream": stream, **fields}
        with httpx.Client(base_url=one.url, timeout=1.0) as http:
            if stream:
                with http.stream("POST", "/v1/completions", json=body) as response:
                    next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/completions", json=body)
        wait_until(one.is_empty, 10)
        pause.set()
        wait_until(lambda: one.metrics()["onegraph_client_disconnects_total"] == 1)
        assert one.engine.stats.num_generated_tokens < 60


def test_a_client_that_leaves_while_it_waits(model_folder: Path) -> None:
    with live(model_folder, engine={"max_num_seqs": 1}) as one:
        with one.openai.completions.create(
            model="tiny", prompt="a", stream=True, temperature=0, max_tokens=120, extra_body={"ignore_eos": True}
        ) as first:
            next(iter(first))
            step = one.engine.try_step
            slower = threading.Event()

            def slow() -> Any:
                slower.wait(0.2)
                return step()

            one.engine.try_step = slow  # type: ignore[method-assign]
            with pytest.raises(httpx.ReadTimeout):
                one.http.post("/v1/completions", json={"prompt": "b", **LONG}, timeout=0.5)
            wait_until(lambda: one.metrics()["onegraph_requests_waiting"] == 0)
            assert one.server.client.num_requests == 1
            slower.set()
        wait_until(one.is_empty)


def test_half_a_request_is_nothing(server: Live) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for sent in (
        b"POST /v1/compl",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{",
        b"\x00\xff" * 50,
    ):
        with socket.create_connection((host, int(port))) as one:
            one.sendall(sent)
    assert server.http.get("/health").status_code == 200
    wait_until(server.is_empty)
