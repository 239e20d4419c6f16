"""EngineConfig refuses what makes no sense before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from onegraph.config.compilation import CompilationConfig
from onegraph.config.engine import EngineConfig
from onegraph.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 0),
        ("max_num_batched_tokens", -1),
        ("num_kv_blocks", 1.5),
        ("max_num_seqs", 0),
        ("max_num_seqs", None),
        ("block_size", True),
        ("tensor_parallel_size", 2),
        ("seed", "1"),
        ("enforce_eager", 1),
        ("enable_prefix_caching", None),
        ("trust_remote_code", "no"),
        ("compilation_config", {"backed": "eager"}),
    ],
)
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name if name != "compilation_config" else "did you mean 'backend'"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("given", [None, 2, "O2", {"level": 2}])
def test_any_form_of_compilation_config_is_read(given: Any) -> None:
    read = EngineConfig(compilation_config=given).compilation_config
    assert read == (CompilationConfig() if given is None else CompilationConfig(level=2))
