"""What transformers itself generates, and when a different token is only a tie."""

from __future__ import annotations

from typing import Any

import torch

TIE_TOLERANCE = 1e-4
"""Two tokens whose fp64 logits are nearer than this may come in either order in fp32."""
MAX_TIES = 0.01
"""At most this share of the generated tokens may be such ties."""


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
