"""What all tests share: a compile cache of their own, and no network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import compiler_cache

os.environ["HF_HUB_OFFLINE"] = "1"
# How long an example takes says what else the machine does.
settings.register_profile("onegraph", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("onegraph")


@pytest.fixture(scope="session")
def session_cache_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One compile cache for the whole run, so that tests that don't care about it share artifacts."""
    root = tmp_path_factory.mktemp("cache")
    root.chmod(0o700)
    return root


@pytest.fixture(scope="session", autouse=True)
def cached_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """The folder in front of PATH with the g++ that compiles nothing twice; None where there is no g++."""
    compiler = shutil.which("g++")
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "compiler"
    yield None if compiler is None else compiler_cache.put_before_path(compiler, shared)
    for large in shared.rglob("*.gch"):  # pytest keeps the folders of some runs
        large.unlink(missing_ok=True)


@pytest.fixture
def real_compiler(cached_compiler: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of how long the compiler runs, beside what, and of its end: each run is a real one."""
    folders = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(one for one in folders if one != str(cached_compiler)))


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
