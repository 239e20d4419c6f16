"""One tiny model for all tests here: its folder, the same in transformers, and an LLM."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import write_model
from transformers import LlamaForCausalLM

from onegraph import LLM


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are too small to share, and threads that wait for others crawl on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> Any:
    """The model in transformers, fp32."""
    return LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def llm(model_folder: Path) -> LLM:
    """The model in onegraph, eager, fp32."""
    return LLM(str(model_folder), dtype="float32", enforce_eager=True, num_kv_blocks=256)
