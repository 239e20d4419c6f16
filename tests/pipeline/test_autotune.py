"""Autotuned choices: measured once, recorded, shown, replayed, and part of the artifact's key."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch.export import Dim

import onegraph
from onegraph.counters import counters
from onegraph.errors import ArtifactError, CompileError, ConfigError

OURS, TEMPLATE = "bmm", "CppMicroGemmFP32Vec"
SHAPES = {"a": {1: Dim("rows", min=1, max=64)}}
MEASURED = {"inductor_compiles": 1, "autotune_benchmarks": 1}
REPLAYED = {"inductor_compiles": 1, "autotune_benchmarks": 0}
LOADED = {"inductor_compiles": 0, "autotune_benchmarks": 0, "gxx_runs": 0, "store_hits": 1}


def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b).relu() + 1


def other_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b).sigmoid()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compiled(function: Callable[..., Any] = products, **config: Any) -> Any:
    made = onegraph.compile(function, dynamic_shapes=SHAPES, config=config)
    for rows in (16, 1, 7, 64):
        a, b = torch.randn(4, rows, 32), torch.randn(4, 32, 32)
        torch.testing.assert_close(made(a, b), function(a, b))
    return made


def choices(made: Any) -> list[dict[str, Any]]:
    return [
        choice for piece in made.explain().to_dict()["pieces"] for one in piece["ranges"] for choice in one["autotuned"]
    ]


def record(cache: Path) -> Path:
    (path,) = (cache / "autotuned" / "choices").rglob("*.json")
    return path


def edit(cache: Path, choice: str) -> None:
    data = json.loads(record(cache).read_text())
    record(cache).write_text(json.dumps({**data, "choice": choice}))


def key(made: Any) -> str:
    return str(made.explain().to_dict()["pieces"][0]["ranges"][0]["key"])


def wrapper(cache: Path, made: Any) -> str:
    manifest = json.loads((cache / "entries" / key(made)[:2] / key(made) / "manifest.json").read_text())
    blob = manifest["files"]["wrapper.py"]["sha256"]
    assert manifest["facts"]["autotuned"] == choices(made)
    return (cache / "blobs" / blob[:2] / blob).read_text()


def test_a_choice_is_measured_once_recorded_and_shown(fresh_cache: Path) -> None:
    with counters.expect(**MEASURED):
        first = compiled(autotune="record")
    (choice,) = choices(first)
    assert choice["op"] == "bmm"
    assert choice["inputs"] == ["float32[4, 64, 32] strides [2048, 32, 1]", "float32[4, 32, 32] strides [1024, 32, 1]"]
    assert set(choice["microseconds"]) == {OURS, TEMPLATE}
    assert choice["choice"] == min(choice["microseconds"], key=choice["microseconds"].get)
    kept = json.loads(record(fresh_cache).read_text())
    assert {name: kept[name] for name in choice} == choice
    assert kept["machine"]["target"]["threads"] == 1
    assert "autotuned bmm of float32[4, 64, 32] strides [2048, 32, 1] and" in str(first.explain())
    for mode in ("record", "replay"):
        with counters.expect(**LOADED):
            assert choices(compiled(autotune=mode)) == [choice]
    with counters.expect(**REPLAYED):  # another piece asks the same
        assert choices(compiled(other_products, autotune="record")) == [choice]


def test_an_edited_choice_is_another_artifact(fresh_cache: Path) -> None:
    made = compiled(autotune="record")
    took = choices(made)[0]["choice"]
    other = OURS if took == TEMPLATE else TEMPLATE
    edit(fresh_cache, other)
    with counters.expect(**REPLAYED):
        replayed = compiled(autotune="replay")
    assert choices(replayed)[0]["choice"] == other
    assert key(replayed) != key(made)
    calls = {choices(one)[0]["choice"]: "extern_kernels.bmm" in wrapper(fresh_cache, one) for one in (made, replayed)}
    assert calls == {OURS: True, TEMPLATE: False}
    with counters.expect(**LOADED):
        assert key(compiled(autotune="record")) == key(replayed)
    edit(fresh_cache, took)
    with counters.expect(**LOADED):
        assert key(compiled(autotune="replay")) == key(made)
    edit(fresh_cache, "cutlass")
    with pytest.raises(ArtifactError, match=r"'cutlass', which is none of its kernels"):
        compiled(autotune="replay")


def test_a_replay_of_nothing_is_an_error(fresh_cache: Path) -> None:
    with counters.expect(autotune_benchmarks=0), pytest.raises(CompileError, match="no choice is recorded for bmm of"):
        compiled(autotune="replay")


def test_a_record_that_can_not_be_read_is_measured_anew(fresh_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled(autotune="record")
    record(fresh_cache).write_text('{"op": "bmm"}')
    with counters.expect(autotune_benchmarks=1):
        compiled(autotune="record")
    assert "is unreadable" in caplog.text
    assert json.loads(record(fresh_cache).read_text())["choice"] in (OURS, TEMPLATE)


def test_without_a_cache_each_compile_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEGRAPH_DISABLE_COMPILE_CACHE", "1")
    with counters.expect(**MEASURED):
        assert len(choices(compiled(autotune="record"))) == 1
    with pytest.raises(ConfigError, match=r"autotune=replay takes choices from the compile cache, and that is off"):
        compiled(autotune="replay")


@pytest.mark.parametrize(
    ("config", "benchmarks"),
    [({}, 0), ({"autotune": "off"}, 0), ({"level": 3}, 1), ({"level": 3, "autotune": "off"}, 0), ({"level": 1}, 0)],
)
def test_what_is_measured_by_level(config: dict[str, Any], benchmarks: int, fresh_cache: Path) -> None:
    with counters.expect(autotune_benchmarks=benchmarks):
        assert len(choices(compiled(**config))) == benchmarks


@pytest.mark.parametrize(("config", "benchmarks"), [({}, 1), ({"autotune": "off"}, 0)])
def test_what_torchs_own_configuration_asks_for_is_recorded(
    config: dict[str, Any], benchmarks: int, fresh_cache: Path
) -> None:
    with (
        torch._inductor.config.patch(max_autotune_gemm=True),
        counters.expect(autotune_benchmarks=benchmarks),
    ):
        assert len(choices(compiled(**config))) == benchmarks


def test_two_processes_measure_once_and_agree(fresh_cache: Path) -> None:
    program = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests.pipeline.test_autotune import *\n"
        "made = compiled({}, autotune='record')\n"
        "print(json.dumps([choices(made), counters.snapshot().get('autotune_benchmarks', 0)]))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program.format(function)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "ONEGRAPH_CACHE_ROOT": str(fresh_cache)},
        )
        for function in ("products", "other_products")
    ]
    (one, measured), (other, measured_too) = (json.loads(process.communicate()[0]) for process in running)
    assert one == other
    assert measured + measured_too == 1
