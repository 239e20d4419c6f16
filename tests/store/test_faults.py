"""Whatever becomes of the files, of the disk and of other processes: a right answer, one line, no partial entry."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

import onegraph
from onegraph.counters import counters
from onegraph.errors import ArtifactError
from onegraph.ir.artifact import Artifact
from onegraph.ir.key import Key
from onegraph.store import files
from onegraph.store.layer import Layer
from onegraph.store.removal import prune
from onegraph.store.store import Store
from onegraph.store.verify import verify

KINDS = ("manifest.json", "wrapper.py", "kernels.so", "graph.txt.gz")
CONTENTS = {"wrapper.py": b"def call(args):\n    return args\n" * 9, "kernels.so": bytes(range(256)) * 40}
KEY = Key.of({"graph": "0123", "target": {"threads": 2}}, "%0 = placeholder")


def truncated(at: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        contents = path.read_bytes()
        path.write_bytes(contents[: at(len(contents))])

    return damage


def flipped(at: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        contents = bytearray(path.read_bytes())
        contents[at(len(contents))] ^= 1
        path.write_bytes(contents)

    return damage


def put_in_its_place(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


FAULTS: dict[str, Callable[[Path], None]] = {
    "truncated to nothing": truncated(lambda size: 0),
    "truncated to a byte": truncated(lambda size: 1),
    "truncated to half": truncated(lambda size: size // 2),
    "truncated by a byte": truncated(lambda size: size - 2),  # the last one of a manifest is the end of its last line
    "flipped in its header": flipped(lambda size: 0),
    "flipped in its body": flipped(lambda size: size // 2),
    "flipped in its trailer": flipped(lambda size: size - 2),
    "appended to": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "deleted": lambda path: path.unlink(),
    "of other text": lambda path: path.write_text("foreign\n"),
    "a folder": put_in_its_place(lambda path: (path.mkdir(), (path / "inside").write_text("foreign"))),
    "a pipe": put_in_its_place(os.mkfifo),
    "a device": put_in_its_place(lambda path: path.symlink_to("/dev/zero")),
}


def where(root: Path, digest: str, name: str) -> Path:
    manifest = root / "entries" / digest[:2] / digest / "manifest.json"
    if name == "manifest.json":
        return manifest
    sha256 = json.loads(manifest.read_text())["files"][name]["sha256"]
    return root / "blobs" / sha256[:2] / sha256


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_never_read_and_is_written_anew(
    tmp_path: Path, name: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "root")
    store.open_root()
    store.write(Artifact(KEY, CONTENTS))
    assert store.read(KEY.digest) is not None
    FAULTS[fault](where(store.root, KEY.digest, name))
    no_entry = (name, fault) == ("manifest.json", "deleted")
    with counters.expect(store_quarantined=int(not no_entry)):
        assert store.read(KEY.digest) is None
    lines = [record.message for record in caplog.records]
    assert len(lines) == int(not no_entry) and all("moved to quarantine" in line for line in lines)
    assert Layer(store.root).digests() == [] and (store.root / "quarantine").exists() is not no_entry
    store.write(Artifact(KEY, CONTENTS))
    again = store.read(KEY.digest)
    assert again is not None and {n: again.files[n].read_bytes() for n in CONTENTS} == CONTENTS
    assert verify(store).problems == []


@pytest.mark.parametrize("seed", range(20))
def test_no_flipped_bit_of_a_manifest_is_believed(tmp_path: Path, seed: int) -> None:
    store = Store(tmp_path / "root")
    store.open_root()
    store.write(Artifact(KEY, CONTENTS, mutates_inputs=True, aligned_inputs=(1, 2)))
    path = where(store.root, KEY.digest, "manifest.json")
    whole, expected = path.read_bytes(), Layer(store.root).manifest(KEY.digest)
    drawn = random.Random(seed)
    for _ in range(20):
        contents = bytearray(whole)
        contents[drawn.randrange(len(whole))] ^= 1 << drawn.randrange(8)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(contents)
        found = store.read(KEY.digest)
        assert found is None or found.manifest == expected, bytes(contents)


def model(x: torch.Tensor) -> torch.Tensor:
    return x @ x  # torch's own kernel: no C++ compiler runs


def with_kernels(x: torch.Tensor) -> torch.Tensor:
    return x.exp() + 3


def start(function: Any = model) -> str:
    compiled = onegraph.compile(function)
    torch.testing.assert_close(compiled(torch.ones(3, 3)), function(torch.ones(3, 3)))
    return str(compiled.explain().pieces[0].ranges[0].store)


def digest_in(root: Path) -> str:
    (digest,) = [one for one in Layer(root).digests() if "wrapper.py" in Layer(root).manifest(one).files]
    return digest


@pytest.mark.parametrize("fault", ["truncated to half", "flipped in its body", "a folder"])
def test_a_model_gives_the_right_answer_on_damaged_files(fresh_cache: Path, fault: str) -> None:
    start()
    for name in ("manifest.json", "wrapper.py"):
        FAULTS[fault](where(fresh_cache, digest_in(fresh_cache), name))
        assert [start(), start()] == ["miss", "hit"]


@pytest.mark.full
@pytest.mark.parametrize("name", KINDS)
def test_a_model_with_kernels_gives_the_right_answer_on_every_fault(fresh_cache: Path, name: str) -> None:
    start(with_kernels)
    for fault, damage in FAULTS.items():
        path = where(fresh_cache, digest_in(fresh_cache), name)
        contents = path.read_bytes()
        path.unlink()  # this process has the library mapped, and would die of a SIGBUS where it ends early
        path.write_bytes(contents)
        damage(path)
        assert [start(with_kernels), start(with_kernels)] == ["miss", "hit"], fault


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_costs_only_the_entry(
    fresh_cache: Path, failing: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk takes so many files, and then none: of two blobs and a manifest."""
    taken = iter(range(1, failing))

    def full(descriptor: int) -> None:
        if next(taken, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    fresh_cache.mkdir(mode=0o700)
    (fresh_cache / "entries").mkdir()
    files.put(fresh_cache / "CACHEDIR.TAG", b"")
    monkeypatch.setattr(files.os, "fsync", full)
    assert start() == "off"
    (line,) = [record.message for record in caplog.records if "No space left" in record.message]
    assert (
        "couldn't be kept" in line and Layer(fresh_cache).digests() == [] and not list(fresh_cache.rglob(".writing-*"))
    )
    monkeypatch.undo()
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(fresh_cache))
    assert [start(), start()] == ["miss", "hit"]


WRITER = """
import sys
from pathlib import Path
from onegraph.ir.artifact import Artifact
from onegraph.ir.key import Key
from onegraph.store.store import Store

store = Store(Path(sys.argv[1]))
store.open_root()
print("begun", flush=True)
for number in range(10**9):
    store.write(Artifact(Key.of({"number": number}), {"a": b"%d" % number * 100_000, "b": b"b" * number}))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(15, marks=pytest.mark.full)])
def test_writers_that_are_killed_leave_whole_entries(tmp_path: Path, kills: int) -> None:
    store, drawn = Store(tmp_path / "root"), random.Random(kills)
    for _ in range(kills):
        victim = subprocess.Popen([sys.executable, "-c", WRITER, str(store.root)], stdout=subprocess.PIPE, text=True)
        assert victim.stdout is not None and victim.stdout.readline() == "begun\n"
        time.sleep(drawn.uniform(0, 0.3))
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        assert verify(store).problems == []
        assert all(store.read(digest) is not None for digest in Layer(store.root).digests())


TOGETHER = """
import sys, torch, onegraph
from onegraph.counters import counters

compiled = onegraph.compile(lambda x: x @ x)
assert torch.equal(compiled(torch.ones(2, 2)), torch.full((2, 2), 2.0))
print(compiled.explain().pieces[0].ranges[0].store, counters.snapshot().get("inductor_compiles", 0))
"""


@pytest.mark.parametrize("num_processes", [2, pytest.param(8, marks=pytest.mark.full)])
def test_of_processes_that_start_together_one_compiles(fresh_cache: Path, num_processes: int) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", TOGETHER], stdout=subprocess.PIPE, text=True)
        for _ in range(num_processes)
    ]
    found = sorted(process.communicate(timeout=500)[0].strip() for process in running)
    assert found == ["hit 0"] * (num_processes - 1) + ["miss 1"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")], ids=str
)
def test_without_locks_everybody_compiles(
    fresh_cache: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(self: Any, *args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    assert start() == "miss" and caplog.text.count("compiling without one") == 1
    assert start() == "hit"


@pytest.mark.parametrize("years", [-30, 30])
def test_no_clock_matters(fresh_cache: Path, years: int) -> None:
    """Entries of another century, by what they say and by the time of their files."""
    start()
    path = where(fresh_cache, digest_in(fresh_cache), "manifest.json")
    then = time.time() + years * 365 * 86400
    for one in fresh_cache.rglob("*"):
        os.utime(one, (then, then))
    prune(fresh_cache, max_bytes=10**9)
    assert start() == "hit" and path.exists()
    os.utime(path, (then, then))
    assert prune(fresh_cache, max_age_s=3600).entries == (1 if years < 0 else 0)


@pytest.mark.parametrize("moment", ["after it was written", "after it was read"])
def test_the_root_may_vanish_at_any_moment(fresh_cache: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "write" if moment == "after it was written" else "read"
    if name == "read":
        start()
    real = getattr(Store, name)

    def vanishing(self: Store, *args: Any) -> Any:
        found = real(self, *args)
        shutil.rmtree(fresh_cache)
        return found

    monkeypatch.setattr(Store, name, vanishing)
    assert start() == ("off" if name == "write" else "miss")  # what was compiled is lost, or kept anew
    monkeypatch.setattr(Store, name, real)
    assert [start(), start()] == ["miss" if name == "write" else "hit", "hit"]


def test_a_root_that_can_only_be_read_is_refused_and_goes_into_the_base(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    access = os.access
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "access", lambda path, mode: mode & os.W_OK == 0 and access(path, mode)
        )  # root may do anything
        with pytest.raises(
            ArtifactError, match=f"is not writable(.|\n)*ONEGRAPH_CACHE_BASE={fresh_cache}, which is only"
        ):
            start()
    monkeypatch.setenv("ONEGRAPH_CACHE_BASE", str(fresh_cache))
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(tmp_path / "other"))
    assert start() == "hit"
