"""`onegraph compile` without weights, for this CPU and for others: its file is run, or refused with what differs."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from onegraph.targets import target_for
from onegraph.targets.cpu.march import MARCHES
from tests.architectures import make_model

SETTINGS = ("--dtype=float32", "--num-kv-blocks=32", "--max-model-len=128", "--max-num-batched-tokens=64")
RUN = ("--prompt=def f(", "--prompt=x", "--max-tokens=12", "--json")
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the CPUs that are named are x86-64")


def command(root: Path, *words: str, threads: int = 2) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")}
    environment.update(ONEGRAPH_CACHE_ROOT=str(root), OMP_NUM_THREADS=str(threads))
    return subprocess.run(
        [sys.executable, "-m", "onegraph.cli.main", *words],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def facts_of(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ran.returncode == 0, ran.stderr
    facts: dict[str, Any] = json.loads(ran.stdout)
    return facts


def tokens(facts: dict[str, Any]) -> list[list[int]]:
    return [one["token_ids"] for one in facts["outputs"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` has its weights, `config` has none."""
    folder = tmp_path_factory.mktemp("models")
    make_model("llama", folder / "whole")
    shutil.copytree(folder / "whole", folder / "config", ignore=shutil.ignore_patterns("*.safetensors*"))
    return folder


@pytest.fixture(scope="module")
def compiled(models: Path) -> tuple[Path, dict[str, Any]]:
    """A file that was compiled for one thread from the config alone, and what the command told."""
    file = models / "model.onegraph"
    words = ("compile", str(models / "config"), "-o", str(file), "--threads=1", "--json", *SETTINGS)
    return file, facts_of(command(models / "root", *words))


def test_the_config_is_enough_and_the_first_load_does_the_rest(
    compiled: tuple[Path, dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    file, made = compiled
    assert made["weights_read"] is False and made["machine"]["threads"] == 1 and made["artifacts"] == 3
    assert made["start"] == "cold" and any("groups of weights are merged" in one for one in made["pending"])
    assert any("chosen by measuring" in one for one in made["pending"])
    shutil.copytree(models / "whole", tmp_path / "config")  # the weights come later, under the same name
    words = ("run", str(tmp_path / "config"), *RUN, *SETTINGS)
    loaded = facts_of(command(tmp_path / "root", *words, "--num-kv-blocks=40", "--artifact", str(file), threads=1))
    assert loaded["explain"]["index"]["status"] == "hit" and len(loaded["explain"]["passes"]) > 0
    eager = facts_of(command(tmp_path / "root", *words, "--enforce-eager", threads=1))
    plain = facts_of(command(tmp_path / "other", *words, threads=1))
    assert plain["explain"]["index"]["status"] == "miss"
    assert tokens(loaded) == tokens(eager) == tokens(plain)


def test_what_it_isnt_for_is_refused_with_what_differs(
    compiled: tuple[Path, dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    def refusal(*words: str, model: str = "whole", threads: int = 1) -> str:
        root, file = tmp_path / "root", str(compiled[0])
        ran = command(root, "run", str(models / model), "--artifact", file, *RUN, *SETTINGS, *words, threads=threads)
        assert ran.returncode == 1 and f"[OG-ARTIFACT] {file} isn't for this module, call or machine" in ran.stderr
        return ran.stderr.splitlines()[0]

    assert "machine.target.threads: was 1, is 2" in refusal(threads=2, model="config")  # before weights are looked for
    assert "num_tokens was 1..64, and is 1..32" in refusal("--max-num-batched-tokens=32")
    assert "num_blocks_per_req was 1..8, and is 1..4" in refusal("--max-model-len=64")
    assert "num_reqs was 1..256, and is 1..3" in refusal("--max-num-seqs=3")
    assert "config.compile_sizes: was [], is [8]" in refusal("-O.compile_sizes=[8]")
    assert "config.inductor_compile_config.size_asserts" in refusal("-O.inductor_compile_config.size_asserts=false")
    dtype = refusal("--dtype=bfloat16")
    assert "weight" in dtype and "float32" in dtype and "bfloat16" in dtype


@x86
def test_code_for_another_cpu_runs_where_its_instructions_are_or_is_refused(models: Path, tmp_path: Path) -> None:
    model, file = str(models / "whole"), str(tmp_path / "avx2.onegraph")
    if MARCHES["avx2"].missing(target_for("cpu").fingerprint()["cpu_flags"]):
        pytest.skip("this CPU has no AVX2")
    words = ("compile", str(models / "config"), "-o", file, "--march=avx2", "--threads=2", *SETTINGS)
    made = command(tmp_path / "one", *words)
    assert made.returncode == 0 and "for CPU, AVX2 (avx2), 2 threads: 3 artifacts" in made.stdout, made.stderr
    assert made.stdout.rstrip().endswith("no weights were read")
    run = ("run", model, *RUN, *SETTINGS)
    loaded = facts_of(command(tmp_path / "two", *run, "--artifact", file))
    assert loaded["explain"]["device"] == "CPU, AVX2 (avx2), 2 threads"
    assert loaded["explain"]["index"]["status"] == "hit"
    assert tokens(loaded) == tokens(facts_of(command(tmp_path / "two", *run, "--enforce-eager")))
    other = command(tmp_path / "two", *run, "--artifact", file, threads=1)
    assert other.returncode == 1 and "machine: machine.target.threads: was 2, is 1\n" in other.stderr


@x86
def test_a_wider_cpus_code_is_made_here_without_the_models_memory(tmp_path: Path) -> None:
    """A model of 8 GB of weights, for AVX-512, wherever this runs."""
    folder, file = make_model("llama", tmp_path / "model"), tmp_path / "wide.onegraph"
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8)
    config.update(head_dim=128, vocab_size=128256)
    (folder / "config.json").write_text(json.dumps(config))
    words = ("compile", str(folder), "-o", str(file), "--march=avx512", "--threads=3", "--json", "--dtype=bfloat16")
    made = facts_of(command(tmp_path / "root", *words, "--num-kv-blocks=64"))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    assert peak < 2 << 30, f"{peak >> 20} MiB"
    assert (made["machine"]["march"], made["machine"]["isa"], made["machine"]["threads"]) == ("avx512", "AVX512", 3)
    with zipfile.ZipFile(file) as archive:
        contents = [archive.read(name) for name in archive.namelist() if name.startswith("blobs/")]
    libraries = [one for one in contents if one.startswith(b"\x7fELF")]
    assert len(libraries) == 2
    if shutil.which("objdump"):
        for index, library in enumerate(libraries):
            (tmp_path / f"{index}.so").write_bytes(library)
            text = subprocess.run(["objdump", "-d", tmp_path / f"{index}.so"], capture_output=True, text=True).stdout
            assert "%zmm" in text
    assert any(
        b"at::vec::Vectorized" in one and b"static_cast<int64_t>(32L)" in one for one in contents
    )  # bf16 at once: twice as many as with AVX2
    missing = MARCHES["avx512"].missing(target_for("cpu").fingerprint()["cpu_flags"])
    refused = command(tmp_path / "root", "run", str(folder), "--artifact", str(file), "--num-kv-blocks=64")
    assert refused.returncode == 1 and "machine.target.threads: was 3, is 2" in refused.stderr
    if missing:
        assert "machine.target.isa: was 'AVX512', is '" in refused.stderr
        assert f"machine.target.cpu_flags: lacks {' '.join(missing)!r}" in refused.stderr


def test_bad_usage_says_what_is_possible(tmp_path: Path) -> None:
    def told(*words: str) -> str:
        ran = command(tmp_path / "root", "compile", *words)
        assert ran.returncode == 2, ran.stderr
        return ran.stderr

    file = str(tmp_path / "x")
    assert "it is one of native, avx2, avx512, amx" in told("-o", file, "--march=avx3")
    assert "a whole number from 1 to 4096" in told("-o", file, "--threads=0") and "4096" in told(
        "-o", file, "--threads=9999"
    )
    assert "-o FILE says where to" in told()
    assert "there is no folder" in told("-o", str(tmp_path / "nowhere" / "x"))
    assert "--artifact is for" in told("-o", file, "--artifact", file)
