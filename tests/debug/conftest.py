"""One compile cache for the tests of `onegraph debug`, with the built-in model's pieces unpacked, and one start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onegraph.config.engine import EngineConfig
from onegraph.debug.pieces import PieceModel

WORDS = ["--num-kv-blocks=64", "--max-num-batched-tokens=64"]
CONFIG = {"num_kv_blocks": 64, "max_num_batched_tokens": 64}
UNPACKED = {"compile_cache_save_format": "unpacked"}

Edit = Callable[[Path, str, str, str], Path]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("debug") / "root"


@pytest.fixture
def in_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(root))


@pytest.fixture(scope="session")
def model(root: Path) -> PieceModel:
    """Started once; nothing that the tests ask of it changes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEGRAPH_CACHE_ROOT", str(root))
        return PieceModel(EngineConfig(compilation_config=UNPACKED, **CONFIG))


@pytest.fixture
def edit() -> Iterator[Edit]:
    """Replaces text in a file of a folder, for one test."""
    before: dict[Path, str] = {}

    def replace(folder: Path, name: str, old: str, new: str) -> Path:
        path = folder / name
        text = before[path] = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        return path

    yield replace
    for path, text in before.items():
        path.write_text(text)
