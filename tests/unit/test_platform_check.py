"""Where onegraph can't run, it says so in one line."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import pytest

import onegraph
from onegraph.errors import ConfigError
from onegraph.platform_check import platform_problem, require_supported, torch_problem


@pytest.fixture(autouse=True)
def checked_anew() -> None:
    require_supported.cache_clear()


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("2.10.1", False),
        ("2.11.0", True),
        ("2.12.0+cu130", True),
        ("2.13.0+cpu", True),
        ("2.14.0", False),
        ("2.14.0a0+git123", False),
        ("3.0", False),
    ],
)
def test_the_range_of_torch(version: str, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if supported:
        assert torch_problem() is None
        require_supported()
    else:
        with pytest.raises(ConfigError, match="ONEGRAPH_ALLOW_UNTESTED_TORCH=1") as caught:
            require_supported()
        assert version in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_untested_torch_can_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.99.0")
    monkeypatch.setenv("ONEGRAPH_ALLOW_UNTESTED_TORCH", "1")
    require_supported()


def test_no_torch_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'torch>=2.11,<2.14'"):
        require_supported()


@pytest.mark.parametrize(
    ("system", "machine", "supported"),
    [
        ("linux", "x86_64", True),
        ("linux", "aarch64", True),
        ("linux", "riscv64", False),
        ("darwin", "arm64", False),
        ("win32", "AMD64", False),
    ],
)
def test_platforms(system: str, machine: str, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if supported:
        assert platform_problem() is None
    else:
        with pytest.raises(ConfigError, match=f"not on {system} {machine}"):
            require_supported()


@pytest.mark.parametrize("name", ["LLM", "SamplingParams", "compile", "support_torch_compile"])
def test_a_public_name_that_needs_torch_says_so_before_torch_is_touched(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.8.0")
    monkeypatch.delitem(vars(onegraph), name, raising=False)
    with pytest.raises(ConfigError, match=r"torch 2\.8\.0 is installed"):
        getattr(onegraph, name)
    assert onegraph.CompilationConfig(level=1).level == 1, "what needs no torch works all the same"
