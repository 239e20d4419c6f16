"""The thirteen architectures that onegraph is proven on, as tiny models with random weights and real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 258
END_OF_TEXT = 256

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": END_OF_TEXT,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": END_OF_TEXT,
}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, **_WINDOWED},
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, **_EXPERTS},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4, "sliding_window": 8, **_EXPERTS},
    "gemma2": {
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        **_WINDOWED,
    },
    "gemma3_text": {"query_pre_attn_scalar": 16, **_WINDOWED},
    "phi3": {"sliding_window": 8},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "olmo2": {},
    "glm4": {"partial_rotary_factor": 0.5},
}


def make_model(architecture: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Writes a folder as a user would have it: config, safetensors, tokenizer. The same seed, the same weights.

    Weights are drawn wider than by default, so that the likeliest token is clearly the likeliest.
    """
    only_own = architecture in ("gpt2", "opt")
    common = {k: v for k, v in _COMMON.items() if not (architecture == "gpt2" and k not in ("vocab_size",))}
    if only_own:
        common.update({k: _COMMON[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")})
    config = AutoConfig.for_model(architecture, **{**common, **ARCHITECTURES[architecture]})
    config.initializer_range = 0.2
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, then the end of text; no merges, so that any text works."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary["<|endoftext|>"] = END_OF_TEXT
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
