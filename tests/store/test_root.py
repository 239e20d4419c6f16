"""The root folder: whose it is, and what happens where it can't be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import onegraph
from onegraph.errors import ArtifactError
from onegraph.store.store import Store


def test_the_root_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "b")
    store.open_root()
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_a_root_that_others_can_write_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ArtifactError, match="chmod 700"):
        Store(tmp_path).open_root()


def test_a_root_that_was_asked_for_and_cant_be_made_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(blocker / "cache"))
    with pytest.raises(ArtifactError, match="can't be made"):
        onegraph.compile(lambda x: x + 1)(torch.zeros(3))


def test_a_default_root_that_cant_be_made_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.delenv("ONEGRAPH_CACHE_ROOT")
    monkeypatch.setenv("HOME", str(blocker))
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    compiled = onegraph.compile(lambda x: x + 1)
    assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))
    assert compiled.explain().to_dict()["pieces"][0]["ranges"][0]["store"] == "off"
    assert "won't be kept" in caplog.text


def test_a_root_removed_while_in_use_costs_a_recompile(fresh_cache: Path) -> None:
    import shutil

    def model(x: torch.Tensor) -> torch.Tensor:
        return x.exp() + 3

    first = onegraph.compile(model)
    first(torch.zeros(3))
    shutil.rmtree(fresh_cache)
    assert torch.equal(first(torch.zeros(3)), torch.full((3,), 4.0))
    second = onegraph.compile(model)
    second(torch.zeros(3))
    assert second.explain().to_dict()["pieces"][0]["ranges"][0]["store"] == "miss"
    assert os.path.isdir(fresh_cache)


@pytest.mark.parametrize(
    "contents", [b"", b"\xff\xfe\x00", b"[]", b"[" * 100_000], ids=["empty", "binary", "list", "deep"]
)
def test_a_manifest_of_any_bytes_is_quarantined(tmp_path: Path, contents: bytes) -> None:
    store = Store(tmp_path / "root")
    store.open_root()
    manifest = store.root / "entries" / "ab" / "abcd" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(contents)
    assert store.read("abcd") is None
    assert not manifest.exists()
