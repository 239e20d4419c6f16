"""What transformers itself generates, and when a different token is only a tie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TIE_TOLERANCE = 1e-4
"""Two tokens whose fp64 logits are nearer than this may come in either order in fp32."""
MAX_TIES = 0.01
"""At most this share of the generated tokens may be such ties."""


def load_reference(folder: Path, dtype: torch.dtype) -> Any:
    """The model in transformers, with experts in plain ops: the grouped ones have no fp64."""
    config = AutoConfig.from_pretrained(folder)
    has_experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
    experts = {"experts_implementation": "eager"} if has_experts else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **experts).eval()


def expected(reference: Any, prompt: list[int], max_tokens: int, **generate: Any) -> list[int]:
    """The tokens with which transformers' own greedy `generate` continues the prompt, served alone."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            **generate,
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def is_tie(reference64: Any, prompt: list[int], got: list[int], want: list[int]) -> bool:
    """False where they are equal; True for a first difference between equally likely tokens; else fails."""
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
    if at is None:
        assert len(got) == len(want)
        return False
    with torch.no_grad():
        logits = reference64(torch.tensor([prompt + want[:at]])).logits[0, -1]
    difference = abs(float(logits[got[at]] - logits[want[at]]))
    assert difference < TIE_TOLERANCE, f"token {at} is {got[at]}, not {want[at]}; logits differ by {difference}"
    return True
