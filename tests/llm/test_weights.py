"""LLM owns its weights: they are merged in memory, and whatever changes one is seen by the next request."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onegraph import LLM, SamplingParams
from onegraph.counters import counters

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
CONFIG = {"backend": "eager", "passes": {"merge_linears": {"if_present": True}}}


def started(folder: Path, **options: Any) -> LLM:
    """Without prefix caching, which keeps what other weights computed."""
    return LLM(str(folder), dtype="float32", num_kv_blocks=64, enable_prefix_caching=False, **options)


def generated(llm: LLM) -> list[int]:
    return list(llm.generate("def f(x):", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


def attention(llm: LLM) -> Any:
    return llm._started.model.module.model.model.layers[0].self_attn


def other(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().clone().flip(0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: layer.k_proj.weight.copy_(other(layer.k_proj.weight)),
    "data": lambda layer: setattr(layer.k_proj.weight, "data", other(layer.k_proj.weight)),
    "a new Parameter": lambda layer: setattr(
        layer.v_proj, "weight", torch.nn.Parameter(other(layer.v_proj.weight), requires_grad=False)
    ),
    "tied": lambda layer: setattr(layer.v_proj.weight, "data", layer.q_proj.weight.data[: len(layer.v_proj.weight)]),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_between_requests_is_seen(name: str, model_folder: Path) -> None:
    with counters.expect(weights_merged=0):
        eager = started(model_folder, enforce_eager=True)
    llm = started(model_folder, compilation_config=CONFIG)
    assert generated(llm) == generated(eager)
    for one in (llm, eager):
        CHANGES[name](attention(one))
    for _ in range(2):
        assert generated(llm) == generated(eager)


@torch.no_grad()
def test_no_prefix_of_other_weights_is_used(model_folder: Path) -> None:
    prompt = {"prompt_token_ids": [*range(1, 40)]}  # two blocks, and more

    def tokens(llm: LLM) -> tuple[list[int], int]:
        output = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
        return list(output.outputs[0].token_ids), output.metrics.num_cached_tokens

    eager = started(model_folder, enforce_eager=True)
    llm = LLM(str(model_folder), dtype="float32", num_kv_blocks=64, compilation_config=CONFIG)
    for name, change in CHANGES.items():
        tokens(llm)
        assert tokens(llm) == (tokens(eager)[0], 32)
        for one in (llm, eager):
            change(attention(one))
        assert tokens(llm) == (tokens(eager)[0], 0), name
    for one in (llm, eager):
        weight = attention(one).o_proj.weight
        weight.data.copy_(other(weight))  # torch counts no write of the tensor for this
    llm.reset_prefix_cache()
    assert tokens(llm) == (tokens(eager)[0], 0)


def test_its_weights_are_merged(model_folder: Path) -> None:
    llm = started(model_folder, compilation_config=CONFIG)
    layer = attention(llm)
    q, k, v = layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight
    assert (q.data_ptr() + q.nbytes, k.data_ptr() + k.nbytes) == (k.data_ptr(), v.data_ptr())
