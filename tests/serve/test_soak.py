"""Minutes of random traffic: every answer is checked, and nothing is left behind.

SOAK_SECONDS sets how long (default 600). All requests go to a server of this process on 127.0.0.1; at most 24 are
in flight, and at most 40 start in a second.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import openai
import pytest

from onegraph import LLM, SamplingParams
from tests.serve.live_server import Live, live, wait_until

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
IN_FLIGHT, PER_SECOND = 24, 40
MOST_TOKENS = 60


class Soak:
    """Random requests, and what their answers must be."""

    def __init__(self, llm: LLM, one: Live) -> None:
        self.outcomes: Counter[str] = Counter()
        self._client = openai.AsyncOpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0, timeout=120)
        self._random = random.Random(1)
        prompts = [
            f"{'a shared beginning of some length, ' * (n % 2)}prompt {n} {'x' * (n * 3 % 30)}" for n in range(32)
        ]
        self._prompts = prompts
        greedy = SamplingParams(temperature=0, max_tokens=MOST_TOKENS, ignore_eos=True, logprobs=0)
        self._greedy = [out.outputs[0] for out in llm.generate(prompts, greedy, use_tqdm=False)]
        self._seeded = {
            seed: [
                [list(sample.token_ids), sample.text]
                for out in llm.generate(prompts, self._sampled(seed), use_tqdm=False)
                for sample in out.outputs
            ]
            for seed in range(4)
        }
        self._text = llm.get_tokenizer().decode

    def _sampled(self, seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.2, top_p=0.9, seed=seed, max_tokens=20, ignore_eos=True)

    async def run(self, seconds: float) -> None:
        until, running = time.monotonic() + seconds, set[asyncio.Task[None]]()
        async with self._client:
            while time.monotonic() < until:
                if len(running) < IN_FLIGHT:
                    running.add(asyncio.create_task(self._one()))
                await asyncio.sleep(1 / PER_SECOND)
                done = {task for task in running if task.done()}
                for task in done:
                    task.result()
                running -= done
            await asyncio.gather(*running)

    async def _one(self) -> None:
        kind = self._random.choice(
            [self._greedy_text, self._greedy_text, self._seeded_text, self._left, self._wrong, self._stopped]
        )
        await kind(self._random.randrange(len(self._prompts)))
        self.outcomes[kind.__name__.strip("_")] += 1

    async def _text_of(self, prompt: Any, **fields: Any) -> tuple[str, str | None]:
        stream = self._random.random() < 0.5
        fields.setdefault("temperature", 0)
        answer = await self._client.completions.create(
            model="tiny", prompt=prompt, stream=stream, extra_body={"ignore_eos": True}, **fields
        )
        if not stream:
            return answer.choices[0].text, answer.choices[0].finish_reason
        text, reason = "", None
        async for chunk in answer:
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason
        return text, reason

    async def _greedy_text(self, number: int) -> None:
        max_tokens = self._random.randint(1, MOST_TOKENS)
        expected = self._text(list(self._greedy[number].token_ids)[:max_tokens], skip_special_tokens=True)
        got = await self._text_of(self._prompts[number], max_tokens=max_tokens)
        assert got == (expected, "length"), number

    async def _seeded_text(self, number: int) -> None:
        seed = self._random.randrange(4)
        got = await self._text_of(self._prompts[number], seed=seed, max_tokens=20, temperature=1.2, top_p=0.9)
        assert got == (self._seeded[seed][number][1], "length"), (number, seed)

    async def _stopped(self, number: int) -> None:
        whole = self._greedy[number].text
        at = self._random.randrange(len(whole) - 2)
        stop = whole[at : at + 2]
        got = await self._text_of(self._prompts[number], max_tokens=MOST_TOKENS, stop=stop)
        if "�" not in stop:
            assert got == (whole[: whole.index(stop)], "stop"), (number, stop)

    async def _left(self, number: int) -> None:
        """Leaves after some chunks, or while it waits."""
        n = self._random.randint(1, 3)
        call = self._client.completions.create(
            model="tiny", prompt=self._prompts[number], max_tokens=MOST_TOKENS, n=n, stream=True, temperature=0
        )
        patience_s = self._random.random() / 20 if self._random.random() < 0.3 else 60.0
        try:
            stream = await asyncio.wait_for(call, patience_s)
        except TimeoutError:
            return
        async with stream, aclosing(aiter(stream)) as chunks:
            async for _ in chunks:
                if self._random.random() < 0.2:
                    return

    async def _wrong(self, number: int) -> None:
        fields: dict[str, Any] = self._random.choice([{"temperature": -1}, {"n": 10**6}, {"prompt": [10**6]}])
        with pytest.raises(openai.BadRequestError):
            await self._client.completions.create(**{"model": "tiny", "prompt": self._prompts[number], **fields})


@pytest.mark.full
@pytest.mark.timeout(SECONDS + 300)
# httpx leaves its own stream to the garbage collector where a request is cancelled between two reads.
@pytest.mark.filterwarnings("ignore:.*AsyncResponseStream:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "engine", [{"max_num_seqs": 8, "num_kv_blocks": 20, "max_num_batched_tokens": 64}], ids=["small"]
)
def test_soak(engine: dict[str, Any], model_folder: Path, llm: LLM) -> None:
    with live(model_folder, engine=engine) as one:
        soak = Soak(llm, one)
        asyncio.run(soak.run(SECONDS))
        wait_until(one.is_empty)
        found = one.metrics()
        write_log(soak.outcomes, found)
        assert min(soak.outcomes.values()) > 0 and len(soak.outcomes) == 5
        assert one.http.get("/health").status_code == 200
        assert not [name for name in found if 'errors_total{endpoint="/v1/completions",status="5' in name]
        assert found["onegraph_preemptions_total"] > 0
    assert one.code == 0


def write_log(outcomes: Counter[str], metrics: dict[str, float]) -> None:
    """The counts of a long run, before its verdict, to be committed."""
    names = [name for name in sorted(metrics) if not name.partition("{")[0].endswith(("_bucket", "_created"))]
    counted = [f"{name} {metrics[name]:g}" for name in names]
    Path(__file__).with_name("soak_full.log").write_text(
        f"{SECONDS:g} s, answers checked or hung up by kind: {dict(sorted(outcomes.items()))}\n\n"
        + "\n".join(counted)
        + "\n"
    )
