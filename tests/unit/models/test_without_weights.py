"""A model that is made without its weights has the tensors that the one with them has, and takes no memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from onegraph.errors import ConfigError
from onegraph.models import load_model
from onegraph.targets import host_zeros
from tests.architectures import ARCHITECTURES, make_model


def kinds(module: torch.nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for is_weight, tensors in ((True, module.named_parameters), (False, module.named_buffers)):
        for name, value in tensors(remove_duplicate=False):
            same = first.setdefault(id(value), name)
            facts = (type(value), value.dtype, value.shape, value.stride(), value.device, value.requires_grad)
            found[name] = (is_weight, same, *facts, None if is_weight else value.tolist())
    return found


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_its_tensors_are_of_the_same_kinds_and_buffers_have_their_values(
    architecture: str, dtype: str, tmp_path: Path
) -> None:
    folder = make_model(architecture, tmp_path / "model")
    expected = load_model(folder, dtype=dtype)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    made = load_model(folder, dtype=dtype, zeros=host_zeros)
    assert kinds(made.module) == kinds(expected.module)
    assert all(not bool(one.any()) for one in made.module.parameters())
    facts = ("name", "kv", "max_model_len", "num_parameters", "weight_bytes")
    assert [getattr(made, name) for name in facts] == [getattr(expected, name) for name in facts]


def test_a_config_without_a_dtype_asks_for_one(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="doesn't say the dtype") as raised:
        load_model(folder, zeros=host_zeros)
    assert "--dtype" in str(raised.value)
    assert load_model(folder, dtype="float32", zeros=host_zeros).kv.dtype is torch.float32
