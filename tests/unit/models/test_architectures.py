"""What is refused and why: every rule by the smallest config that breaks it, and the mask rules by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_causal_mask_function,
)

from onegraph.errors import ModelError
from onegraph.models.architectures import check_architecture
from onegraph.models.masks import MaskRequest, first_difference
from onegraph.models.rotary import fix_frequencies

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "chunked": (
        "llama4_text",
        {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
        "rule of its attention mask",
    ),
    "window only in the mask": ("phimoe", {"sliding_window": 8}, "no window, but by its mask position 8"),
    "window not asked for": ("smollm3", ALTERNATING, "no window, but by its mask"),
    "bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}, "causal"),
    "state-space beside attention": (
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
        "Conv1d mixes tokens",
    ),
    "attention twice a layer": ("diffllama", {}, "4 of its 2 layers"),
    "recurrent": ("rwkv", {}, "keeps a state"),
    "own attention code": ("bloom", {}, "attention mask"),
    "keywords not handed down": ("stablelm", {}, "don't reach its attention"),
    "other values than keys": ("deepseek_v2", {"first_k_dense_replace": 2}, "keys .* and values"),
    "quantized": ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    "more than text": ("gemma3", {}, "more than text"),
}
UNDERSTOOD: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING},
    "cohere2": ALTERNATING,
    "gpt_neox": {},
}


def config_of(kind: str, fields: dict[str, Any]) -> Any:
    return AutoConfig.for_model(kind, **({} if kind == "gemma3" else COMMON), **fields)


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_flat_batch_cannot_do_is_refused_with_the_reason(case: str) -> None:
    kind, fields, reason = REFUSED[case]
    with pytest.raises(ModelError, match=rf"(?s){kind}.*{reason}"):
        check_architecture(config_of(kind, fields), False)


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_what_is_understood_is_served_with_a_warning(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    layout = check_architecture(config_of(kind, UNDERSTOOD[kind]), False)
    assert (layout.num_layers, layout.head_dim) == (2, 16)
    assert kind in caplog.text


@pytest.mark.parametrize("window", [None, 1, 5, 2047, 4096])
def test_a_mask_that_is_what_attention_applies(window: int | None) -> None:
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    assert first_difference(MaskRequest(rule), window, 10_000) is None


@pytest.mark.parametrize(
    ("rule", "window"),
    [
        (sliding_window_causal_mask_function(5), 6),
        (sliding_window_causal_mask_function(6), 5),
        (sliding_window_causal_mask_function(2047), None),
        (sliding_window_causal_mask_function(2047), 2048),
        (causal_mask_function, 4096),
        (and_masks(causal_mask_function, chunked_overlay(4096, torch.zeros(1, dtype=torch.int64))), None),
        (or_masks(causal_mask_function, lambda batch, head, query, key: key < 3), None),
    ],
)
def test_a_mask_that_differs_anywhere_is_found(rule: Any, window: int | None) -> None:
    assert "by its mask position" in str(first_difference(MaskRequest(rule), window, 10_000))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_frequencies_stay_what_they_are_for_short_contexts(kind: str) -> None:
    """A batch-mate beyond the original length must not change a short request."""
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 32}
    fields = {"rope_parameters": parameters, "original_max_position_embeddings": 32} if kind == "longrope" else {}
    config = config_of("phi3" if kind == "longrope" else "llama", fields or {"rope_parameters": parameters})
    assert check_architecture(config, False).num_layers == 2
    model = AutoModelForCausalLM.from_config(config).eval()
    rotary, hidden = model.model.rotary_emb, torch.zeros(1, 3, 64)
    short, beyond = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 90]])
    with torch.no_grad():
        wanted = rotary(hidden, short)[0]
        changed = rotary(hidden, beyond)[0][:, :2]
        assert not torch.equal(changed, wanted[:, :2]), "transformers itself changes the batch-mates"
        rotary(hidden, short)
        assert fix_frequencies(model) == {"longrope": 32, "dynamic": 64}[kind]
        assert torch.equal(rotary(hidden, beyond)[0][:, :2], wanted[:, :2])
