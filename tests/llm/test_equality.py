"""Tokens and log-probabilities equal transformers', whatever is batched, chunked, preempted or cached."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from onegraph import LLM, SamplingParams
from tests.reference import MAX_TIES, expected, is_tie

MAX_TOKENS = 16


def prompts(number: int = 8) -> list[list[int]]:
    """Of many lengths, some with a common beginning."""
    rng = random.Random(0)
    made = [[rng.randrange(256) for _ in range(rng.choice([1, 2, 5, 17, 33, 60]))] for _ in range(number)]
    return [*made, made[-1] + [1, 2], made[-1][:20], made[-1]]


@pytest.fixture(scope="module")
def greedy(reference: Any) -> list[tuple[list[int], list[int]]]:
    """Prompts with what transformers continues them with."""
    return [(prompt, expected(reference, prompt, MAX_TOKENS)) for prompt in prompts()]


SETTINGS = [
    {},
    {"max_num_batched_tokens": 7},
    {"max_num_batched_tokens": 3, "max_num_seqs": 2},
    {"num_kv_blocks": 12, "max_num_batched_tokens": 50, "block_size": 8},
    {"num_kv_blocks": 100, "block_size": 1, "enable_prefix_caching": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_tokens_equal_transformers_generate(
    settings: dict, model_folder: Path, reference: Any, greedy: list[tuple[list[int], list[int]]]
):
    llm = LLM(str(model_folder), dtype="float32", enforce_eager=True, **{"num_kv_blocks": 256, **settings})
    reference64 = copy.deepcopy(reference).double()
    given = [{"prompt_token_ids": prompt} for prompt, _ in greedy]
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    ties, num_tokens = 0, 0
    for (prompt, want), output in zip(greedy, llm.generate(given, params, use_tqdm=False), strict=True):
        got = list(output.outputs[0].token_ids)
        ties += is_tie(reference64, prompt, got, want)
        num_tokens += len(got)
        assert output.prompt_token_ids == prompt
    assert ties <= MAX_TIES * num_tokens
    stats = llm.engine.stats
    assert stats.num_free_blocks == stats.num_blocks
    assert (stats.num_preemptions > 0) == (settings.get("num_kv_blocks") in (12, 100))


def test_a_requests_tokens_do_not_depend_on_its_batch_mates(llm: LLM):
    params = SamplingParams(temperature=0, max_tokens=16)
    given = [{"prompt_token_ids": p} for p in prompts()]
    together = [list(o.outputs[0].token_ids) for o in llm.generate(given, params, use_tqdm=False)]
    alone = [list(llm.generate(p, params, use_tqdm=False)[0].outputs[0].token_ids) for p in given]
    assert together == alone


def test_end_of_text_min_tokens_and_repetition_penalty_equal_transformers(llm: LLM, reference: Any):
    given, max_tokens = prompts(6), 20
    free = [expected(reference, p, max_tokens, eos_token_id=None) for p in given]
    ends = sorted({tokens[4] for tokens in free})
    cases: list[tuple[dict, dict]] = [
        ({"stop_token_ids": ends}, {"eos_token_id": [256, *ends]}),
        ({"stop_token_ids": ends, "min_tokens": 8}, {"eos_token_id": [256, *ends], "min_new_tokens": 8}),
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    ]
    for params, generate in cases:
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in given],
            SamplingParams(temperature=0, max_tokens=max_tokens, **params),
            use_tqdm=False,
        )
        for prompt, output in zip(given, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == expected(reference, prompt, max_tokens, **generate), params


def test_logprobs_equal_log_softmax_of_transformers_logits(llm: LLM, reference: Any):
    given = prompts(4)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in given],
        SamplingParams(temperature=1.3, top_k=3, seed=1, max_tokens=10, logprobs=4, prompt_logprobs=2),
        use_tqdm=False,
    )
    for prompt, output in zip(given, outputs, strict=True):
        completion = output.outputs[0]
        ids = [*prompt, *completion.token_ids]
        with torch.no_grad():
            want = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1)
        got = [*output.prompt_logprobs, *completion.logprobs]
        assert got[0] is None and len(got) == len(ids)
        for at in range(1, len(ids)):
            assert len(got[at]) in ((2, 3) if at < len(prompt) else (4, 5))
            assert ids[at] in got[at]
            for token, entry in got[at].items():
                assert entry.logprob == pytest.approx(float(want[at - 1, token]), abs=1e-4)
            assert [e.rank for e in got[at].values()][:2] == [1, 2]
        total = sum(float(want[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_bfloat16_stays_close_to_float32(model_folder: Path, reference: Any):
    llm = LLM(str(model_folder), dtype="bfloat16", enforce_eager=True, num_kv_blocks=64)
    prompt = prompts(4)[3]
    output = llm.generate(
        {"prompt_token_ids": prompt}, SamplingParams(prompt_logprobs=0, max_tokens=1), use_tqdm=False
    )[0]
    with torch.no_grad():
        want = torch.log_softmax(reference(torch.tensor([prompt])).logits[0], -1)
    for at in range(1, len(prompt)):
        assert output.prompt_logprobs[at][prompt[at]].logprob == pytest.approx(
            float(want[at - 1, prompt[at]]), rel=0.1, abs=1.0
        )
