"""Models of given shapes with random weights, written as a user would have them. `python -m bench.models NAME DIR`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, Any]] = {
    "toy-4": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "toy-30": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 30,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}


def make_config(shape: str, num_layers: int | None = None) -> Any:
    """The transformers config of a shape, with another number of layers if given. KeyError: an unknown name."""
    fields = dict(SHAPES[shape])
    if num_layers is not None:
        fields["num_hidden_layers"] = num_layers
    kind = fields.pop("model_type")
    return AutoConfig.for_model(
        kind, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0, **fields
    )


ASCII_ALPHABET = [chr(256 + i) for i in range(33)] + [chr(i) for i in range(33, 127)] + [chr(256 + 33)]
"""How byte-level tokenizers spell the bytes 0 to 127."""


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level for ASCII texts, and each id of the model has a whole text of its own: after the bytes, made-up words.

    A random model generates any id, and a server sends a token when it has text to send: with ids without text, or
    with parts of characters, there may be no event to measure. No merges, so that texts are encoded as bytes.
    """
    vocab = {character: i for i, character in enumerate(ASCII_ALPHABET)}
    for i in range(len(vocab), vocab_size):
        vocab[f"\u0120w{i}"] = i  # U+0120 is how a space is spelt
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_model(
    shape: str, folder: Path, *, num_layers: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Writes config, safetensors and a tokenizer; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = make_config(shape, num_layers)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(config.vocab_size)).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(make_model(sys.argv[1], Path(sys.argv[2])))
