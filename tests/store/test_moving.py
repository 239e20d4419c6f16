"""Making room, and taking artifacts to another root: `prune`, `export` and `import`, on a store of small entries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onegraph.cli.main import main
from onegraph.ir.artifact import Artifact
from onegraph.ir.key import Key
from onegraph.store.choices import Choices
from onegraph.store.layer import Layer
from onegraph.store.signing import Signer
from onegraph.store.store import Store
from onegraph.store.verify import verify

DAY = 86400
SHARED = b"shared" * 1000
KEYS = [Key.of({"graph": f"{number}", "target": {"name": "cpu"}}, f"%{number}") for number in range(4)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Four entries of 10 KiB, used 0 to 3 days ago, that share a file."""
    made = Store(tmp_path / "root")
    made.open_root()
    for age, key in enumerate(KEYS):
        made.write(Artifact(key, {"own": bytes([age]) * 10_000, "kernels.so": SHARED}))
        used(made, key, age * DAY)
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(made.root))
    return made


def used(store: Store, key: Key, seconds_ago: float) -> None:
    then = time.time() - seconds_ago
    os.utime(store.layers[0].entry(key.digest) / "manifest.json", (then, then))


def onegraph(root: Path, *words: str, code: int = 0) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "onegraph.cli.main", "cache", *words],
        env={**os.environ, "ONEGRAPH_CACHE_ROOT": str(root)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def cache(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert main(["cache", *words, "--json"]) == code
    shown = capsys.readouterr()
    return json.loads(shown.out) if shown.out else shown.err


def held(root: Path) -> list[Key]:
    return [key for key in KEYS if key.digest in Layer(root).digests()]


def test_prune_removes_what_was_used_longest_ago(store: Store) -> None:
    assert "removed 0 entries" in onegraph(store.root, "prune", "--max-size", "1G", "--max-age", "30d")
    assert "removed 1 entry" in onegraph(store.root, "prune", "--max-age", "60h")
    assert held(store.root) == KEYS[:3] and verify(store).problems == [] and verify(store).orphans == []


def test_prune_keeps_what_was_read_since_and_files_that_others_have(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store.read(KEYS[3].digest) is not None  # a hit is a use
    freed = cache(capsys, "prune", "--max-size", "32K")
    assert held(store.root) == [KEYS[0], KEYS[3]] and freed["entries"] == freed["left_entries"] == 2
    assert freed["left_bytes"] <= 32 * 1024 and freed["size_bytes"] > 20_000
    assert all(store.read(key.digest) is not None for key in held(store.root))
    assert cache(capsys, "prune", "--max-size", "0")["left_entries"] == 0
    assert not Layer(store.root).blobs()


def test_prune_removes_what_nobody_needs_and_not_what_is_being_written(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store.root / "blobs" / "ab"
    folder.mkdir(exist_ok=True)
    old, young, left = folder / ("ab" * 32), folder / ("ab" * 31 + "ff"), folder / ".writing-dead"
    for path in (old, young, left):
        path.write_bytes(b"orphan")
    for path in (old, left):
        os.utime(path, (time.time() - DAY,) * 2)
    (store.root / "quarantine" / "bad").mkdir(parents=True)
    (store.root / "unpacked" / "edited").mkdir(parents=True)
    cache(capsys, "prune", "--max-size", "1G")
    assert [path.exists() for path in (old, young, left)] == [False, True, False]
    assert held(store.root) == KEYS and (store.root / "quarantine" / "bad").exists()
    cache(capsys, "prune", "--max-size", "0")
    assert not (store.root / "quarantine" / "bad").exists() and (store.root / "unpacked" / "edited").exists()


def test_a_reader_whose_entry_is_pruned_has_a_miss(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    manifest = store.layers[0].manifest(KEYS[0].digest)
    record = manifest.files["own"]
    store.layers[0].blob(record.sha256).unlink()
    assert store.read(KEYS[0].digest) is None and len(caplog.records) == 1


def test_what_is_exported_is_imported_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "artifacts.zip", tmp_path / "other"
    Choices(store).keep_asked("ab" * 32, ("cd" * 32,))
    assert f"4 entries and 1 record of choices, 0.0 MiB written to {file}" in onegraph(store.root, "export", str(file))
    told = onegraph(other, "import", str(file), "--dry-run")
    assert "4 entries" in told and "4 new would be imported" in told and told.count("not signed") == 4
    assert not other.exists()
    assert "all verified; 4 new imported into" in onegraph(other, "import", str(file))
    taken = Store(other)
    assert held(other) == KEYS and verify(taken).problems == [] and Choices(taken).asked_by("ab" * 32) == ("cd" * 32,)
    for key in KEYS:
        found, original = taken.read(key.digest), store.read(key.digest)
        assert found is not None and original is not None and found.manifest == original.manifest
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(other))
    assert all(one["had"] for one in cache(capsys, "import", str(file))["entries"])


def test_single_entries_are_exported_with_the_choices_that_they_need(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = Key.of({**KEYS[0].factors, "autotuned": {"cd" * 32: "mm: fast"}})
    store.write(Artifact(tuned, {"own": b"tuned"}))
    Choices(store).keep_asked(KEYS[0].digest, ("cd" * 32,))
    store.write_record({"choice": "fast"}, "autotuned", "choices", "cd", f"{'cd' * 32}.json")
    store.write_record({}, "autotuned", "linear", "ee", f"{'ee' * 32}.json")
    file = tmp_path / "one.zip"
    contents = cache(capsys, "export", str(file), "--key", tuned.digest[:10])
    assert [one["key"] for one in contents["entries"]] == [tuned.digest] and contents["records"] == 2
    assert "no artifacts have a key that begins with 'zz'" in cache(capsys, "export", str(file), "--key", "zz", code=2)


def test_a_bad_entry_isnt_exported_and_no_half_file_is_left(store: Store, tmp_path: Path, capsys: Any) -> None:
    blob = store.layers[0].manifest(KEYS[2].digest).files["own"].sha256
    store.layers[0].blob(blob).write_bytes(b"")
    assert f"the artifact {KEYS[2].digest[:12]} is bad" in cache(capsys, "export", str(tmp_path / "out.zip"), code=1)
    assert not (tmp_path / "out.zip").exists() and not list(tmp_path.glob(".writing-*"))
    assert held(store.root) == KEYS, "an export moves nothing"


def test_files_that_cant_be_read_or_written_are_told(store: Store, tmp_path: Path, capsys: Any) -> None:
    assert "there is no such file" in cache(capsys, "import", str(tmp_path / "none.zip"), code=1)
    assert "no file can be made in" in cache(capsys, "export", str(tmp_path / "none" / "out.zip"), code=1)
    assert "is a folder or a device" in cache(capsys, "export", str(tmp_path), code=1)


def test_an_archive_is_written_through_a_link_and_never_in_place_of_a_device(
    store: Store, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "link.zip").symlink_to(tmp_path / "real.zip")
    cache(capsys, "export", str(tmp_path / "link.zip"))
    assert (tmp_path / "link.zip").is_symlink() and zipfile.is_zipfile(tmp_path / "real.zip")
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder or a device" in cache(capsys, "export", str(tmp_path / "pipe"), code=1)
    assert (tmp_path / "pipe").is_fifo()


def rewritten(change: Callable[[dict[str, bytes]], None]) -> Callable[[Path], None]:
    """Another archive of the same parts, changed."""

    def damage(file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        change(parts)
        with zipfile.ZipFile(file, "w") as archive:
            for name, contents in parts.items():
                archive.writestr(name, contents)

    return damage


def a_blob(parts: dict[str, bytes]) -> str:
    return max(name for name in parts if name.startswith("blobs/"))


def an_entry(parts: dict[str, bytes]) -> str:
    return max(name for name in parts if name.startswith("entries/"))


def other_key(parts: dict[str, bytes]) -> None:
    parts[f"entries/{'ab' * 32}.json"] = parts.pop(an_entry(parts))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "not a zip": lambda file: file.write_text("hello"),
    "other contents": rewritten(lambda parts: parts.update({a_blob(parts): b"\0" * len(parts[a_blob(parts)])})),
    "a larger blob": rewritten(lambda parts: parts.update({a_blob(parts): b"\0" * 1_000_000})),
    "a missing blob": rewritten(lambda parts: parts.pop(a_blob(parts))),
    "a blob too many": rewritten(lambda parts: parts.update({f"blobs/{'ab' * 32}": b""})),
    "a path": rewritten(lambda parts: parts.update({"../../evil": b"", "entries/../evil.json": b"{}"})),
    "an absolute path": rewritten(lambda parts: parts.update({"/tmp/evil": b""})),
    "a record elsewhere": rewritten(lambda parts: parts.update({"autotuned/choices/../../evil.json": b"{}"})),
    "another key": rewritten(other_key),
    "a changed manifest": rewritten(lambda parts: parts.update({an_entry(parts): parts[an_entry(parts)][:-5]})),
    "no contents": rewritten(lambda parts: parts.pop("contents.json")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_bad_archive_nothing_is_imported(
    store: Store, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "artifacts.zip", tmp_path / "deep" / "other"
    cache(capsys, "export", str(file))
    DAMAGES[damage](file)
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(other))
    assert "nothing was imported" in cache(capsys, "import", str(file), code=1)
    assert [path.name for path in other.rglob("*")] == ["CACHEDIR.TAG"] and not list(tmp_path.rglob("evil*"))


def test_with_a_key_only_signed_archives_are_imported(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key, file, other = tmp_path / "key", tmp_path / "artifacts.zip", tmp_path / "other"
    key.write_bytes(b"k" * 16)
    key.chmod(0o600)
    cache(capsys, "export", str(file))
    monkeypatch.setenv("ONEGRAPH_CACHE_KEY_FILE", str(key))
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(other))
    assert "has no signature" in cache(capsys, "import", str(file), code=1) and held(other) == []
    signed = Store(tmp_path / "signed", signer=Signer.of_file(key))
    signed.open_root()
    signed.write(Artifact(KEYS[1], {"own": b"1"}))
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(signed.root))
    cache(capsys, "export", str(file))
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(other))
    assert [one["signed"] for one in cache(capsys, "import", str(file))["entries"]] == [True]
    assert held(other) == [KEYS[1]]
    key.write_bytes(b"another key, as long")
    assert "its signature isn't that of the key" in cache(capsys, "import", str(file), code=1)
