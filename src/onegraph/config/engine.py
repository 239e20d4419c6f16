"""EngineConfig: the settings of the offline and serving engine, checked when they are made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onegraph.config.compilation import CompilationConfig
from onegraph.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """See `onegraph.LLM` for each field. Raises ConfigError for a value that makes no sense."""

    model: Any = None
    dtype: Any = "auto"
    device: str = "auto"
    enforce_eager: bool = False
    compilation_config: CompilationConfig | Mapping[str, Any] | int | str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    num_kv_blocks: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    seed: int = 0
    trust_remote_code: bool = False
    artifact: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_batched_tokens", "num_kv_blocks"):
            if getattr(self, name) is not None:
                self._at_least_one(name)
        for name in ("max_num_seqs", "block_size", "tensor_parallel_size"):
            self._at_least_one(name)
        for name in ("enforce_eager", "enable_prefix_caching", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}", where=name, hint="it takes true or false")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed={self.seed!r}", where="seed", hint="it takes a whole number")
        if self.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size}: this version runs on one device",
                where="tensor_parallel_size",
                hint="leave it out, or give 1",
            )
        object.__setattr__(self, "compilation_config", CompilationConfig.of(self.compilation_config))

    def _at_least_one(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}", where=name, hint="it takes a whole number, 1 or more")
