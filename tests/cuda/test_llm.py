"""`LLM` on a GPU: the tokens of transformers, eager and compiled, and a step that can be recorded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from onegraph import LLM, SamplingParams
from onegraph.errors import ConfigError
from tests.architectures import make_model
from tests.reference import is_tie, load_reference

ENGINE: dict[str, Any] = {"num_kv_blocks": 64, "block_size": 8, "max_num_batched_tokens": 32, "max_num_seqs": 4}
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "unsplit": {"compilation_config": {"splitting_ops": []}},
    "split": {},
}
PROMPT_LENGTHS = (1, 4, 13, 21, 40)
MAX_TOKENS = 12


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2", "mixtral"])
def test_greedy_tokens_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    folder = make_model(architecture, tmp_path / "model")
    reference, reference64 = load_reference(folder, torch.float32).cuda(), load_reference(folder, torch.float64)
    rng = random.Random(architecture)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in PROMPT_LENGTHS]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0
        )
        wanted.append(out[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    for way, arguments in WAYS.items():
        llm = LLM(str(folder), device="cuda", dtype="float32", **ENGINE, **arguments)
        outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        got = [list(out.outputs[0].token_ids) for out in outs]
        ties = sum(is_tie(reference64, *three) for three in zip(prompts, got, wanted, strict=True))
        assert ties <= 1, (way, ties)
        assert "Triton kernel" in llm.summary(), llm.summary()
        if way == "split":
            assert all(check.ok for check in llm.check(3))


def test_the_device_is_chosen_and_told() -> None:
    assert "CPU" in LLM(device="cpu", enforce_eager=True).summary()
    llm = LLM(enforce_eager=True)
    assert torch.cuda.get_device_name() in llm.summary()
    with pytest.raises(ConfigError, match="device='gpu'"):
        LLM(device="gpu")


def test_sampling_draws_what_the_cpu_draws() -> None:
    """Logits differ by rounding, the numbers that are drawn don't: nearly always the same tokens, and no error."""
    params = [
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=1, max_tokens=8, logprobs=2),
        SamplingParams(temperature=1.0, seed=2, max_tokens=8, presence_penalty=0.5, repetition_penalty=1.1),
        SamplingParams(temperature=0, max_tokens=8, logit_bias={5: 1.0}, min_tokens=4, prompt_logprobs=1),
    ]
    texts = []
    for device in ("cpu", "cuda"):
        llm = LLM(device=device, dtype="float32", enforce_eager=True, num_kv_blocks=64)
        outs = llm.generate(["def ", "import ", "class "], params, use_tqdm=False)
        texts.append([list(out.outputs[0].token_ids) for out in outs])
    assert texts[0] == texts[1]


def test_a_decoding_step_can_be_recorded_and_replayed_bit_for_bit(tmp_path: Path) -> None:
    llm = LLM(str(make_model("llama", tmp_path / "model")), device="cuda", dtype="bfloat16", **ENGINE)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    compiled = llm._started.compiled

    def integers(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device="cuda")

    with torch.inference_mode():
        caches = [(torch.randn_like(k), torch.randn_like(v)) for k, v in llm.engine._runner._kv_caches]
        step = {
            "input_ids": integers(5, 6, 7),
            "positions": integers(9, 0, 16),
            "slot_mapping": integers(9, 16, 48),
            "query_start_loc": integers(0, 1, 2, 3, dtype=torch.int32),
            "seq_lens": integers(10, 1, 17, dtype=torch.int32),
            "block_tables": integers(0, 1, 0, 2, 0, 0, 4, 5, 6, dtype=torch.int32).view(3, 3),
            "logits_indices": integers(0, 1, 2),
            "kv_caches": caches,
        }
        compiled(**step)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            recorded = compiled(**step)
        for ids in ((1, 2, 3), (40, 50, 60)):
            step["input_ids"].copy_(integers(*ids))
            graph.replay()
            replayed = recorded.clone()
            assert torch.equal(replayed, compiled(**step))
