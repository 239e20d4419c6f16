"""The environment's variables: defaults, values, and refusals."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from onegraph.env import VARIABLES, environment
from onegraph.errors import ConfigError


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ONEGRAPH_CACHE_ROOT")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_defaults(tmp_path: Path) -> None:
    current = environment()
    assert current.cache_root == tmp_path / ".cache/onegraph"
    assert not current.cache_root_is_explicit
    assert current.cache_base is current.cache_key_file is None
    assert not current.disable_compile_cache
    assert current.compilation_config is None
    assert current.compile_cache_save_format is None
    assert current.log_level == "WARNING"
    assert not current.allow_untested_torch


def test_the_cache_root_follows_xdg_and_then_its_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert environment().cache_root == Path("/xdg/onegraph")
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", "/mine")
    assert environment().cache_root == Path("/mine")
    assert environment().cache_root_is_explicit


def test_an_unknown_variable_is_an_error_that_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEGRAPH_DISABLE_COMPILE_CASH", "1")
    with pytest.raises(ConfigError, match="did you mean 'ONEGRAPH_DISABLE_COMPILE_CACHE'"):
        environment()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("ONEGRAPH_DISABLE_COMPILE_CACHE", "yes", "set it to 1 or 0"),
        ("ONEGRAPH_ALLOW_UNTESTED_TORCH", "true", "set it to 1 or 0"),
        ("ONEGRAPH_LOG_LEVEL", "DEBUGG", "did you mean 'DEBUG'"),
        ("ONEGRAPH_COMPILATION_CONFIG", "{", "isn't JSON"),
        ("ONEGRAPH_COMPILATION_CONFIG", "[1]", "is a list, not an object"),
    ],
)
def test_a_value_that_makes_no_sense_is_an_error(
    name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told) as caught:
        environment()
    assert name in str(caught.value)


def test_empty_is_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = environment()
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    assert environment() == plain


@pytest.mark.parametrize("extra", [{}, {"ONEGRAPH_NO_SUCH": "1"}, {"ONEGRAPH_LOG_LEVEL": "loud"}], ids=str)
def test_reading_changes_nothing(extra: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ONEGRAPH_LOG_LEVEL": "info", "ONEGRAPH_DISABLE_COMPILE_CACHE": "", **extra}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with contextlib.suppress(ConfigError):
        environment()
    assert dict(os.environ) == before


def test_values_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEGRAPH_COMPILATION_CONFIG", '{"backend": "eager"}')
    monkeypatch.setenv("ONEGRAPH_DISABLE_COMPILE_CACHE", "1")
    monkeypatch.setenv("ONEGRAPH_LOG_LEVEL", "info")
    monkeypatch.setenv("ONEGRAPH_CACHE_BASE", "/image/cache")
    monkeypatch.setenv("ONEGRAPH_CACHE_KEY_FILE", "/run/secrets/key")
    current = environment()
    assert current.cache_base == Path("/image/cache") and current.cache_key_file == Path("/run/secrets/key")
    assert current.compilation_config == {"backend": "eager"}
    assert current.disable_compile_cache
    assert current.log_level == "INFO"
