"""A base that is only read below the root, and signatures: what is used, what isn't, and that a base never changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import onegraph
from onegraph.api import open_store
from onegraph.counters import counters
from onegraph.errors import ArtifactError
from onegraph.store.choices import Choices
from onegraph.store.manifest import Manifest, ManifestError
from onegraph.store.store import Store


def model(x: torch.Tensor) -> torch.Tensor:
    return x @ x  # torch's own kernel: no C++ compiler runs


def other_model(x: torch.Tensor) -> torch.Tensor:
    return x @ x @ x


def start(function: Any = model) -> Any:
    """Compiles or loads, runs, and gives what became of its piece."""
    compiled = onegraph.compile(function)
    torch.testing.assert_close(compiled(torch.ones(3, 3)), function(torch.ones(3, 3)))
    return compiled.explain().pieces[0].ranges[0]


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def digest_of(folder: Path, name: str) -> Path:
    """Where the piece's file of that name lies."""
    for path in (folder / "entries").rglob("manifest.json"):
        files = json.loads(path.read_text())["files"]
        if "wrapper.py" in files:
            return folder / "blobs" / files[name]["sha256"][:2] / files[name]["sha256"]
    raise AssertionError(folder)


def with_checksum(text: str) -> str:
    """As an attacker would write it."""
    data = json.loads(text)
    del data["checksum"]
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return json.dumps({**data, "checksum": hashlib.sha256(canonical.encode()).hexdigest()})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "root"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEGRAPH_CACHE_ROOT", str(folder))
        assert start().store == "miss"
    return folder


@pytest.fixture
def base(prepared: Path, tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(prepared, tmp_path / "base"))
    monkeypatch.setenv("ONEGRAPH_CACHE_BASE", str(folder))
    return folder


@pytest.fixture
def key_file(tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "key"
    write_key(path, b"0123456789abcdef")
    monkeypatch.setenv("ONEGRAPH_CACHE_KEY_FILE", str(path))
    return path


def write_key(path: Path, key: bytes) -> None:
    path.write_bytes(key)
    path.chmod(0o600)


def test_what_the_base_has_is_used_and_what_is_new_goes_to_the_root(
    base: Path, fresh_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = tree(base)
    assert start().store == "hit"
    assert not (fresh_cache / "entries").exists()
    with caplog.at_level("INFO", "onegraph"):
        found = start(other_model)
    assert found.store == "miss" and "differs in graph: was " in found.why
    assert f"piece 0 is compiled: {found.why}" in [record.message for record in caplog.records]
    assert len(list((fresh_cache / "entries").rglob("manifest.json"))) == 2, "its artifact and its trace"
    assert tree(base) == before


@pytest.mark.parametrize("damage", ["flip", "delete", "manifest"])
def test_a_bad_entry_of_the_base_is_left_there_and_compiled_over(
    base: Path, fresh_cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    victim = digest_of(base, "wrapper.py")
    if damage == "flip":
        victim.write_bytes(b"!" + victim.read_bytes()[1:])
    elif damage == "delete":
        victim.unlink()
    else:
        (manifest,) = [p for p in (base / "entries").rglob("manifest.json") if "wrapper.py" in p.read_text()]
        manifest.write_text("{}")
    before = tree(base)
    found = start()
    assert found.store == "miss" and "the stored artifact couldn't be used: it is bad: " in found.why
    (line,) = [record.message for record in caplog.records if "isn't used" in record.message]
    assert str(base) in line and "compiled again" in line
    assert start().store == "hit" and tree(base) == before and not (fresh_cache / "quarantine").exists()


def test_a_bad_entry_of_the_root_falls_through_to_a_good_one_of_the_base(base: Path, fresh_cache: Path) -> None:
    shutil.copytree(base, fresh_cache)
    digest_of(fresh_cache, "wrapper.py").write_bytes(b"")
    assert start().store == "hit" and (fresh_cache / "quarantine").exists()


def test_records_of_choices_are_read_from_the_base_and_written_to_the_root(base: Path, fresh_cache: Path) -> None:
    Choices(Store(base)).keep_asked("ab" * 32, ("cd" * 32,))
    before = tree(base)
    store = open_store()
    assert store is not None and Choices(store).asked_by("ab" * 32) == ("cd" * 32,)
    Choices(store).keep_asked("ab" * 32, ())
    assert Choices(store).asked_by("ab" * 32) == () and tree(base) == before


def test_without_a_root_that_can_be_written_the_base_still_serves(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container whose file system can't be written."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.delenv("ONEGRAPH_CACHE_ROOT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    assert start().store == "hit"
    assert start(other_model).store == "off" and "the cache root is only read" in caplog.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda base, root: base.chmod(0o777), "chmod -R go-w"),
        (lambda base, root: shutil.rmtree(base), "name a folder that has such a cache"),
        (lambda base, root: (shutil.rmtree(base), base.write_text("")), "it is no folder"),
        (lambda base, root: (shutil.rmtree(base), root.mkdir(), base.symlink_to(root)), "the base .* is its root"),
    ],
    ids=["writable", "missing", "a file", "the root"],
)
def test_a_base_that_cant_be_trusted_or_used_is_refused(base: Path, fresh_cache: Path, change: Any, told: str) -> None:
    change(base, fresh_cache)
    with pytest.raises(ArtifactError, match=told) as caught:
        start()
    assert f"ONEGRAPH_CACHE_BASE={base}" in str(caught.value)


def test_entries_are_signed_and_others_arent_used(
    key_file: Path, fresh_cache: Path, prepared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(prepared, fresh_cache)
    with counters.expect(store_refused=2, store_quarantined=0):  # the trace, and the artifact
        found = start()
    assert found.store == "miss" and "it has no signature" in found.why and caplog.text.count("isn't used") == 2
    assert start().store == "hit", "compiling anew has put a signed one in its place"
    manifest = json.loads(
        next(p for p in fresh_cache.rglob("manifest.json") if "wrapper.py" in p.read_text()).read_text()
    )
    assert len(manifest["signature"]) == 64


def test_any_change_of_a_signed_manifest_is_found(key_file: Path, fresh_cache: Path) -> None:
    start()
    (path,) = [p for p in fresh_cache.rglob("manifest.json") if "wrapper.py" in p.read_text()]
    manifest = Manifest.from_json(path.read_text())
    for change in ({"mutates_inputs": True}, {"facts": {}}, {"aligned_inputs": (0,)}):
        path.parent.mkdir(exist_ok=True)
        path.write_text(replace(manifest, **change).to_json())
        with counters.expect(store_quarantined=1):
            assert "its signature isn't that of the key" in start().why
        assert start().store == "hit"


def test_another_key_is_another_signature(key_file: Path, fresh_cache: Path) -> None:
    start()
    write_key(key_file, b"fedcba9876543210")
    assert start().store == "miss" and start().store == "hit"


def test_signed_entries_are_used_without_a_key(key_file: Path, fresh_cache: Path, monkeypatch: Any) -> None:
    start()
    monkeypatch.delenv("ONEGRAPH_CACHE_KEY_FILE")
    assert start().store == "hit"


def test_an_unsigned_base_isnt_used_with_a_key(base: Path, key_file: Path) -> None:
    before = tree(base)
    assert start().store == "miss" and start().store == "hit" and tree(base) == before


@pytest.mark.parametrize("problem", ["mode", "short", "missing"])
def test_a_key_file_that_protects_nothing_is_refused(key_file: Path, problem: str) -> None:
    if problem == "mode":
        key_file.chmod(0o644)
    elif problem == "short":
        write_key(key_file, b"secret")
    else:
        key_file.unlink()
    with pytest.raises(ArtifactError, match="ONEGRAPH_CACHE_KEY_FILE") as caught:
        start()
    assert {"mode": "chmod 600", "short": "16 are the least", "missing": "head -c 32 /dev/urandom"}[problem] in str(
        caught.value
    )


@pytest.mark.parametrize("sha256", ["../../../victim", "ab" * 31, "AB" * 32, ""])
def test_a_manifest_leads_to_no_path_but_a_blobs(
    prepared: Path, tmp_path: Path, fresh_cache: Path, sha256: str
) -> None:
    shutil.copytree(prepared, fresh_cache)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (path,) = [p for p in fresh_cache.rglob("manifest.json") if "wrapper.py" in p.read_text()]
    record = json.loads(path.read_text())["files"]["wrapper.py"]["sha256"]
    text = Manifest.from_json(path.read_text()).to_json().replace(record, sha256)
    with pytest.raises(ManifestError, match="is no file"):
        Manifest.from_json(with_checksum(text))
    path.write_text(with_checksum(text))
    assert start().store == "miss" and victim.read_text() == "mine"


def test_folders_are_for_the_owner_alone_whatever_the_umask(fresh_cache: Path) -> None:
    before = os.umask(0)
    try:
        start()
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in fresh_cache.rglob("*")}
    assert {path: mode for path, mode in modes.items() if mode & 0o022 and "locks" not in str(path)} == {}
