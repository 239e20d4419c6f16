"""`onegraph cache`: each verb from outside once, on a store that another process has filled, and then its cases."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onegraph.cli.main import main
from onegraph.store.files import put
from onegraph.store.manifest import FileRecord, Manifest

MODEL_FLAGS = ("--dtype", "float32", "--max-model-len", "64")
OTHER_OPTION = "-O.inductor_compile_config.size_asserts=false"
Cache = Callable[..., Any]


def onegraph(root: Path, *words: str, code: int = 0, **variables: str) -> str:
    """Runs a command line in a process of its own; gives what it printed, with errors."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")}
    result = subprocess.run(
        [sys.executable, "-m", "onegraph.cli.main", *words],
        env={**kept, "ONEGRAPH_CACHE_ROOT": str(root), **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cache:
    """The same in this process: gives the facts, or the error where another exit code is expected."""

    def run(root: Path, *words: str, code: int = 0) -> Any:
        monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(root))
        capsys.readouterr()
        assert main(["cache", *words, "--json"]) == code
        shown = capsys.readouterr()
        return json.loads(shown.out) if shown.out else shown.err

    return run


def tree(root: Path) -> dict[str, bytes]:
    """All files, but for the marks of their last use."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache") / "root"
    onegraph(root, "run", *MODEL_FLAGS, "--prompt", "def ", "--max-tokens", "1")
    return root


@pytest.fixture
def copied(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "root"))


def manifest_of(root: Path, key: str) -> Path:
    return root / "entries" / key[:2] / key / "manifest.json"


def replace_wrapper(root: Path, key: str, contents: bytes) -> None:
    """Other contents under a consistent checksum."""
    manifest = Manifest.from_json(manifest_of(root, key).read_text())
    record = FileRecord(hashlib.sha256(contents).hexdigest(), len(contents))
    put(root / "blobs" / record.sha256[:2] / record.sha256, contents)
    edited = replace(manifest, files={**manifest.files, "wrapper.py": record})
    manifest_of(root, key).write_text(edited.to_json())


def blob_of(root: Path, key: str, name: str) -> Path:
    digest = json.loads(manifest_of(root, key).read_text())["files"][name]["sha256"]
    return root / "blobs" / digest[:2] / digest


def pieces(root: Path, cache: Cache) -> list[str]:
    return [one["key"] for one in cache(root, "ls")["entries"] if one["kind"] == "piece"]


def test_ls_tells_what_there_is(filled: Path, cache: Cache) -> None:
    before = tree(filled)
    found = cache(filled, "ls")
    kinds = [one["kind"] for one in found["entries"]]
    assert kinds.count("op kernels") == kinds.count("trace") == 1 and kinds.count("piece") == 3
    assert [e["created"] for e in found["entries"]] == sorted((e["created"] for e in found["entries"]), reverse=True)
    piece = next(one for one in found["entries"] if one["kind"] == "piece")
    assert piece["seconds"] > 0 and piece["size_bytes"] > 1000 and "sizes 1..2048 x" in piece["what"]
    assert piece["last_used"] and found["root"] == str(filled) and found["base"] is None
    told = onegraph(filled, "cache", "ls")
    assert "of builtin" in told and "bad" not in told
    assert piece["key"][:12] in told and "5 entries in" in told and tree(filled) == before


def test_a_root_that_is_not_there_is_empty_and_stays_away(tmp_path: Path, cache: Cache) -> None:
    assert cache(tmp_path / "none", "ls")["entries"] == []
    assert cache(tmp_path / "none", "verify")["ok"]
    assert "can't be read" in cache(tmp_path / "none", "clear", code=1)
    assert not (tmp_path / "none").exists()


def test_why_names_the_nearest_entry_and_what_differs_and_changes_nothing(filled: Path, cache: Cache) -> None:
    before = tree(filled)
    misses = json.loads(onegraph(filled, "cache", "why", *MODEL_FLAGS, OTHER_OPTION, "--json"))["pieces"]
    assert [one["index"] for one in misses] == [0, 2, 4, 6, 8]
    for one in misses:
        assert one["store"] == "miss" and one["nearest"] in pieces(filled, cache)
        (differs,) = one["differs"]
        assert differs == {"field": "compiler.config.inductor.size_asserts", "was": True, "is": False}
        assert "differs in compiler.config.inductor.size_asserts: was True, is False" in one["why"]

    (whole,) = cache(filled, "why", "--dtype", "float32", "--max-model-len", "32", "-O.splitting_ops=[]")["pieces"]
    graph, *others = whole["differs"]
    assert whole["store"] == "miss" and "region.ranges" in [one["field"] for one in others]
    assert graph["field"] == "graph" and graph["was"] != graph["is"] and graph["was"].startswith("%")
    assert tree(filled) == before


def test_why_of_a_model_that_is_there_and_of_what_isnt_compiled_or_kept(
    filled: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = onegraph(filled, "cache", "why", *MODEL_FLAGS)
    assert told.count(" hit: same graph, options and machine as on") == 5 and told.endswith("5 hit\n")
    assert "piece 4 (as piece 2)  hit" in told
    assert cache(filled, "why", *MODEL_FLAGS, "--enforce-eager") == {"pieces": []}
    monkeypatch.setenv("ONEGRAPH_DISABLE_COMPILE_CACHE", "1")
    assert "ONEGRAPH_DISABLE_COMPILE_CACHE" in cache(filled, "why", code=2)


def test_verify_finds_each_kind_of_damage_and_moves_nothing(copied: Path, cache: Cache) -> None:
    assert cache(copied, "verify")["problems"] == []
    one, two, three = pieces(copied, cache)
    blob_of(copied, one, "wrapper.py").write_bytes(b"#")
    manifest = Manifest.from_json(manifest_of(copied, two).read_text())
    manifest.factors["compiler"]["config"]["inductor"]["size_asserts"] = False
    manifest_of(copied, two).write_text(manifest.to_json())
    manifest_of(copied, three).chmod(0o666)
    orphan = copied / "blobs" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"left by a dead writer")
    before = tree(copied)
    found = cache(copied, "verify", code=1)
    problems = {problem["where"]: problem["problem"] for problem in found["problems"]}
    assert "bytes" in problems[one] and "digest of its factors" in problems[two]
    assert "other users can write it" in problems[str(manifest_of(copied, three))] and len(problems) == 3
    assert found["orphans"] == [str(orphan)] and not found["ok"]
    assert "something is wrong" in onegraph(copied, "cache", "verify", code=1) and tree(copied) == before


def test_verify_compiles_afresh_and_compares(copied: Path, cache: Cache) -> None:
    """Consistent checksums don't make an artifact what the compiler makes of the piece."""
    edited = pieces(copied, cache)[0]
    replace_wrapper(copied, edited, blob_of(copied, edited, "wrapper.py").read_bytes() + b"# edited\n")
    assert cache(copied, "verify")["ok"]
    before = tree(copied)
    told = onegraph(copied, "cache", "verify", "--recompile", "3", *MODEL_FLAGS, code=1)
    assert f"{edited[:12]}: the generated code has 'its end' where '# edited' is stored" in told
    assert told.count("the same code") == 2 and told.count("BAD") == 1 and tree(copied) == before


def test_clear_empties_the_root_and_touches_nothing_else(copied: Path, tmp_path: Path, cache: Cache) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    (copied / "unpacked" / "ab").mkdir(parents=True)
    (copied / "unpacked" / "ab" / "wrapper.py").write_text("edited")
    shutil.rmtree(copied / "index")
    (copied / "index").symlink_to(outside)
    (copied / "notes.txt").write_text("mine, too")
    freed = cache(copied, "clear", "--edits")
    assert not (copied / "unpacked").exists() and freed["left_entries"] == 5 and freed["size_bytes"] == len("edited")
    assert "removed 5 entries" in onegraph(copied, "cache", "clear")
    assert sorted(path.name for path in copied.iterdir()) == ["CACHEDIR.TAG", "notes.txt"]
    assert (outside / "kept").read_text() == "mine"
    assert cache(copied, "clear", "--edits")["size_bytes"] == 0


def test_clear_and_prune_refuse_a_folder_that_isnt_a_cache(tmp_path: Path, cache: Cache) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "entries").mkdir()
    (tmp_path / "thesis.tex").write_text("")
    for verb in (("clear",), ("clear", "--edits"), ("prune", "--max-size", "0")):
        assert "isn't a compile cache alone: it holds thesis.tex" in cache(tmp_path, *verb, code=1)
    assert (tmp_path / "entries").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "which verb?"),
        (("lss",), "did you mean 'ls'?"),
        (("why", "--no-such"), "there is no flag --no-such"),
        (("prune",), "give --max-size, --max-age, or both"),
        (("prune", "--max-size", "much"), "'much' is no size"),
        (("verify", "-O1"), "are for --recompile"),
    ],
    ids=str,
)
def test_bad_usage(words: tuple[str, ...], told: str, tmp_path: Path, cache: Cache) -> None:
    assert told in cache(tmp_path / "none", *words, code=2)
