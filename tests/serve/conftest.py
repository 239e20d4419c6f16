"""The tiny model offline, and a server of it that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from tiny_llama import write_model

from onegraph import LLM
from tests.serve.live_server import Live, live


@pytest.fixture(scope="session", autouse=True)
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
def llm(model_folder: Path) -> LLM:
    """The same model offline: what a server answers is compared with it."""
    return LLM(str(model_folder), dtype="float32", enforce_eager=True, num_kv_blocks=256)


@pytest.fixture(scope="session")
def server(model_folder: Path, one_thread: None) -> Iterator[Live]:
    """A server that all tests share which leave it as it was."""
    with live(model_folder) as one:
        yield one
        assert one.is_empty()
    assert one.code == 0


@pytest.fixture
def client(server: Live) -> openai.OpenAI:
    return server.openai
