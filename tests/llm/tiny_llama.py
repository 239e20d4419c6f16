"""Writes a tiny Llama with random weights and a byte-level tokenizer as a model folder."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, BOS, NUM_BYTES = 256, 257, 256
MAX_LEN = 128
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ m.role) }}{% endif %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, an end and a start token; no token is added to a prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|bos|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|bos|>")
    assert (fast.eos_token_id, fast.bos_token_id) == (EOS, BOS)
    return fast


def write_model(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, tokenizer: bool = True) -> Path:
    """Writes the model folder. Weights are large enough that greedy texts vary."""
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
        eos_token_id=EOS,
        bos_token_id=BOS,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer:
        fast = byte_tokenizer()
        fast.chat_template = chat_template
        fast.save_pretrained(folder)
    return folder
