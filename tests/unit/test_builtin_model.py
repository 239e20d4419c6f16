"""The model that ships with onegraph is small, loads offline, and writes text that reads as Python."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import onegraph

FOLDER = Path(onegraph.__path__[0]) / "models" / "builtin"

SNIPPET = '''\
def read_lines(path, encoding="utf-8"):
    """Return the lines of the file at path."""
    with open(path, "r", encoding=encoding) as file:
        lines = file.readlines()
    if not lines:
        raise ValueError("the file is empty")
    return [line.strip() for line in lines]


class Reader:
    def __init__(self, path):
        self.path = path

    def read(self):
        return read_lines(self.path)
'''


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True).eval()


def continue_greedily(model, tokenizer, prompt, max_tokens=48):
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**encoded, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def test_files_are_complete_and_small():
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    assert (FOLDER / "model.safetensors").stat().st_size <= 10_000_000


def test_weights_are_bf16_llama_with_grouped_heads(model):
    assert model.config.model_type == "llama"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.num_attention_heads % model.config.num_key_value_heads == 0
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.head_dim % 8 == 0


def test_end_tokens(model, tokenizer):
    assert tokenizer.eos_token == "<|endoftext|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert model.generation_config.eos_token_id == ends


@pytest.mark.parametrize("text", [SNIPPET, "  naïve 日本語 \U0001f600\t\r\n", ""])
def test_tokenizer_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_renders(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(rendered)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_greedy_def_reads_as_python(model, tokenizer):
    text = "def " + continue_greedily(model, tokenizer, "def ")
    assert re.match(r"def [A-Za-z_]\w*\([^\n]*\)( -> [^\n]+)?:\n\s+\S", text), text


def test_greedy_import_names_a_module(model, tokenizer):
    text = continue_greedily(model, tokenizer, "import ")
    name = re.match(r"[A-Za-z_]\w*", text)
    assert name is not None and name.group() in sys.stdlib_module_names, text


def test_chat_answers_with_a_function_and_stops(model, tokenizer):
    messages = [{"role": "user", "content": "Write a function join."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert continue_greedily(model, tokenizer, prompt).startswith("def join(")


def test_loss_is_far_below_random(model, tokenizer):
    ids = tokenizer(SNIPPET, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 0.5 * math.log(model.config.vocab_size), loss


def test_loss_holds_at_the_last_positions(model, tokenizer):
    """Trained up to max_position_embeddings: after a long prefix a text is at most half a nat harder."""
    ids = tokenizer(SNIPPET * 40, return_tensors="pt")["input_ids"][:, : model.config.max_position_embeddings]
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    assert losses[-128:].mean() < losses[:128].mean() + 0.5


def test_card_states_both_losses():
    card = (FOLDER / "README.md").read_text()
    losses = re.search(r"\*\*held-out loss\*\* \| \*\*([\d.]+)\*\*", card)
    random = re.search(r"held-out loss of random weights \| ([\d.]+)", card)
    assert losses is not None and random is not None
    assert float(losses.group(1)) < 0.5 * float(random.group(1))
