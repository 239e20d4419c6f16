"""Loading: real files, sharded too; what isn't supported is refused by name before weights are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from onegraph.counters import counters
from onegraph.errors import ConfigError, ModelError
from onegraph.models import load_model
from onegraph.models.attention import probe_attention
from tests.architectures import byte_tokenizer, make_model


def config_only(folder: Path, kind: str, **fields: Any) -> Path:
    """A folder with a config and no weights: loading must stop before it looks for them."""
    AutoConfig.for_model(kind, **fields).save_pretrained(folder)
    return folder


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "intermediate_size": 32}
UNSUPPORTED = {
    "t5": ({}, "encoder-decoder"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}, "Conv1d mixes tokens"),
    "bert": (SMALL, "isn't causal|no causal language model|whole|attention"),
    "gpt2": ({"n_embd": 32, "n_layer": 1, "n_head": 2, "reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
    "deepseek_v3": (
        {**SMALL, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "moe_intermediate_size": 16},
        "queries .* keys .* values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_isnt_supported_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    fields, reason = UNSUPPORTED[kind]
    with pytest.raises(ModelError, match=rf"(?s){kind}.*({reason})"):
        load_model(config_only(tmp_path, kind, **fields))


def test_a_sharded_model_equals_the_whole_one(tmp_path: Path) -> None:
    whole = make_model("llama", tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    byte_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    one, many = load_model(whole), load_model(tmp_path / "sharded")
    for name, tensor in one.module.state_dict().items():
        assert torch.equal(tensor, many.module.state_dict()[name]), name
    assert one.num_parameters == many.num_parameters == sum(p.numel() for p in model.parameters())


def test_weights_that_the_files_do_not_hold_are_an_error(tmp_path: Path) -> None:
    """transformers would fill them with random numbers and say so in a message only."""
    folder = make_model("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"don't hold 1 of the model's weights: model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        load_model(folder)


def test_contexts_end_where_rotary_frequencies_would_change(tmp_path: Path) -> None:
    folder = make_model("phi3", tmp_path)
    facts = json.loads((folder / "config.json").read_text())
    facts["original_max_position_embeddings"] = 128
    facts["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
    }
    (folder / "config.json").write_text(json.dumps(facts))
    with counters.expect(downgrades=1):
        assert load_model(folder).max_model_len == 128


def test_dtype_is_the_checkpoints_unless_asked(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path, dtype=torch.bfloat16)
    assert load_model(folder).kv.dtype == torch.bfloat16
    assert load_model(folder, dtype="float32").kv.dtype == torch.float32
    with pytest.raises(ConfigError, match="bfloat16"):
        load_model(folder, dtype="bfloat61")


def test_a_folder_that_isnt_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="the folder holds nothing"):
        load_model(tmp_path / "empty")


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code of a model is copied into the test's folder, and leaves this process with the test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def test_code_of_a_model_runs_only_when_asked(tmp_path: Path, own_modules: None) -> None:
    marker = tmp_path / "ran"
    folder = config_only(tmp_path / "model", "llama", **SMALL)
    facts = json.loads((folder / "config.json").read_text())
    facts.update({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}})
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ImportError('ran')\n")
    with pytest.raises(ModelError):
        load_model(folder)
    assert not marker.exists()
    with pytest.raises(ModelError, match="ran"):
        load_model(folder, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("given", [torch.ones(2), 0.5, "yes", [1]], ids=lambda value: type(value).__name__)
def test_what_a_layer_asks_of_attention_and_is_not_understood_is_refused(given: Any) -> None:
    heads = torch.zeros(1, 2, 3, 8)
    layer = torch.nn.Module()
    layer.layer_idx = 4
    with pytest.raises(ModelError, match="the model's attention uses head_bias=") as caught:
        probe_attention(layer, heads, heads, heads, None, onegraph_seen=[], scaling=1.0, head_bias=given)
    assert caught.value.where == "layer 4 (Module)"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"),
        lambda folder: (folder / "tokenizer.json").write_text("no tokenizer"),
    ],
    ids=["no config", "cut config", "no weights", "cut weights", "cut tokenizer"],
)
def test_a_folder_with_a_broken_file_is_one_clear_error(change: Any, tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    change(folder)
    with pytest.raises(ModelError, match="can't be loaded") as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and "the folder holds" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_weights_need_no_gradients_and_are_in_eval_mode(tmp_path: Path) -> None:
    module = load_model(make_model("opt", tmp_path)).module
    assert not module.training or not module.model.training
    assert not any(p.requires_grad for p in module.parameters())
