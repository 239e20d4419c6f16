"""`save` and `load`: a compiled model in one file, taken up by another process, or refused with what differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.errors import ArtifactError, ConfigError

MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, factor=0.5):
        super().__init__()
        self.up, self.down, self.factor = nn.Linear(8, 16), nn.Linear(16, 8), factor

    def forward(self, x, state=None):
        return {"h": self.down(torch.relu(self.up(x))) * self.factor, "size": x.shape[0]}

def make(factor=0.5):
    torch.manual_seed(0)
    return Model(factor).eval()
"""

SAVE = """
import sys, torch, onegraph, model
from torch.export import Dim
compiled = onegraph.compile(model.make(), dynamic_shapes={"x": {0: Dim("n", min=1, max=32)}, "state": None})
with torch.no_grad():
    compiled(torch.randn(3, 8))
compiled.save(sys.argv[1])
"""

LOAD = """
import json, sys, torch, onegraph, model
from onegraph.counters import counters
module = model.make(*map(float, sys.argv[2:]))
compiled = onegraph.load(sys.argv[1], module)
x, error = torch.randn(7, 8), None
with torch.no_grad():
    try:
        difference = (compiled(x)["h"] - module(x)["h"]).abs().max().item()
    except onegraph.errors.OnegraphError as raised:
        difference, error = 0.0, f"{type(raised).__name__}: {raised}"
print(json.dumps({"error": error, "difference": difference, "counters": counters.snapshot(),
                  "index": compiled.explain().to_dict()["index"]}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    (folder / "model.py").write_text(MODEL)
    run(folder, SAVE, [str(folder / "model.onegraph")])
    return folder / "model.onegraph"


def run(folder: Path, program: str, words: list[str], **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")}
    environment.update({"ONEGRAPH_CACHE_ROOT": str(folder / "root"), **variables})
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def load(saved: Path, folder: Path, *words: str, model: str = MODEL, **variables: str) -> dict[str, Any]:
    (folder / "model.py").write_text(model)
    facts: dict[str, Any] = json.loads(run(folder, LOAD, [str(saved), *words], **variables).splitlines()[-1])
    return facts


@pytest.mark.parametrize("variables", [{}, {"ONEGRAPH_DISABLE_COMPILE_CACHE": "1"}], ids=["an empty cache", "no cache"])
def test_another_process_runs_it_without_tracing_or_compiling(
    saved: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    facts = load(saved, tmp_path, PATH="/nowhere", **variables)
    assert facts["error"] is None and facts["difference"] < 1e-5 and facts["index"]["status"] == "hit"
    assert not any(facts["counters"].get(name) for name in ("dynamo_compiles", "inductor_compiles", "gxx_runs"))
    assert (tmp_path / "root" / "entries").exists() is not bool(variables)


def test_what_it_isnt_for_is_refused_with_what_differs(saved: Path, tmp_path: Path) -> None:
    facts = load(saved, tmp_path, "0.25")
    assert facts["error"].startswith("ArtifactError") and "self.factor was 0.5, and is 0.25" in facts["error"]
    edited = load(saved, tmp_path, model=MODEL.replace("torch.relu", "torch.tanh"))
    assert "function: was" in edited["error"]
    threads = load(saved, tmp_path, OMP_NUM_THREADS="1")
    assert "machine.target.threads: was" in threads["error"]


def test_a_bad_file_is_refused(saved: Path, tmp_path: Path, fresh_cache: Path) -> None:
    bad = tmp_path / "bad.onegraph"
    bad.write_bytes(saved.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="bad"):
        onegraph.load(bad, nn.Linear(2, 2))
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            contents = source.read(name)
            target.writestr(name, contents[:-1] + b"x" if name.startswith("blobs/") else contents)
    with pytest.raises(ArtifactError, match="bad"):
        onegraph.load(bad, nn.Linear(2, 2))
    with pytest.raises(ArtifactError):
        onegraph.load(tmp_path / "nothing.onegraph", nn.Linear(2, 2))


def test_what_cant_be_saved_says_why(tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"input": {0: Dim("n", min=1, max=32)}}
    compiled = onegraph.compile(nn.Linear(4, 4), dynamic_shapes=shapes, config={"backend": "aot_eager"})
    with pytest.raises(ConfigError, match="once the model is compiled"):
        compiled.save(tmp_path / "x")
    with torch.no_grad():
        compiled(torch.randn(2, 4))
    with pytest.raises(ArtifactError, match="isn't kept"):
        compiled.save(tmp_path / "x")
    monkeypatch.setenv("ONEGRAPH_DISABLE_COMPILE_CACHE", "1")
    off = onegraph.compile(nn.Linear(4, 4), dynamic_shapes=shapes, config={"backend": "eager"})
    with torch.no_grad():
        off(torch.randn(2, 4))
    with pytest.raises(ArtifactError, match="the compile cache is off"):
        off.save(tmp_path / "x")
    nothing = onegraph.compile(nn.Linear(4, 4), config={"mode": 0})
    nothing(torch.randn(2, 4))
    with pytest.raises(ConfigError, match="nothing is compiled"):
        nothing.save(tmp_path / "x")


def onegraph_command(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")}
    return subprocess.run(
        [sys.executable, "-m", "onegraph.cli.main", *words],
        env={**environment, "ONEGRAPH_CACHE_ROOT": str(root)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_model_compiled_ahead_of_time_runs_from_its_file_alone(tmp_path: Path) -> None:
    file, settings = str(tmp_path / "model.onegraph"), ("--dtype=float32", "--num-kv-blocks=64")
    made = onegraph_command(tmp_path / "one", "compile", "-o", file, *settings, "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["artifacts"] == 3
    words = ("--artifact", file, "--prompt=def ", "--max-tokens=4", "--json", *settings)
    ran = onegraph_command(tmp_path / "two", "run", *words)
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout)
    assert facts["explain"]["index"]["status"] == "hit" and facts["tokens"] == 4
    other = onegraph_command(tmp_path / "two", "run", *words, "--max-num-batched-tokens=64")
    assert other.returncode == 1 and "isn't for this module, call or machine" in other.stderr
    eager = onegraph_command(tmp_path / "two", "run", *words, "--enforce-eager")
    assert eager.returncode == 2 and "nothing of ours is compiled" in eager.stderr
    assert onegraph_command(tmp_path / "two", "compile").returncode == 2
