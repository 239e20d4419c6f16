"""What all tests share: a compile cache of their own, and no network."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def session_cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One compile cache for the whole run, so that tests that don't care about it share artifacts."""
    root = tmp_path_factory.mktemp("cache")
    root.chmod(0o700)
    return root


@pytest.fixture(autouse=True)
def onegraph_environment(session_cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No ONEGRAPH_ variable of the developer's reaches a test; the cache is the session's, without its traces.

    Artifacts are shared for speed, and found by what they are. Traces of other tests would be found by the names of
    models, so that what a test traces would depend on those before it.
    """
    shutil.rmtree(session_cache_root / "index", ignore_errors=True)
    for name in list(os.environ):
        if name.startswith("ONEGRAPH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(session_cache_root))


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty compile cache for one test."""
    root = tmp_path / "cache"
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(root))
    return root


@pytest.fixture(scope="session")
def op_kernels(session_cache_root: Path) -> Any:
    """The attention kernel, built before a test counts runs of the C++ compiler: it is put in once in a process."""
    from onegraph.op_kernels import install_op_kernels
    from onegraph.store.store import Store
    from onegraph.targets import target_for

    found = install_op_kernels(target_for("cpu"), Store(session_cache_root))
    assert found.is_installed, found.why
    return found
