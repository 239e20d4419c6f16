"""`onegraph::linear` in a compiled graph: planned memory, inputs where they lie, warm starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.ops import library
from tests.pipeline.test_plan_memory import allocations

pytestmark = pytest.mark.usefixtures("op_kernels", "no_grad")

SIZES = (7, 1, 64, 7)
SHAPES = {"x": {1: Dim("tokens", min=1, max=64)}}


class GatedLayers(nn.Module):
    """Gate and up as one weight, whose halves are read where they lie; a result that is an output; a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        sizes = ((96, 32), (32, 48), (32,), (40, 48))
        weights = [torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in sizes]
        self.up, self.down, self.bias, self.head = (nn.Parameter(weight.to(dtype)) for weight in weights)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        linear = torch.ops.onegraph.linear
        for _ in range(2):
            both = linear(x * 2, self.up, None)
            gate, up = both.chunk(2, -1)
            x = x + linear(torch.sigmoid(gate) * up, self.down, self.bias)
        return x, linear(up, self.head, None)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def inputs(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, size, 32, generator=torch.Generator().manual_seed(size)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_results_and_planned_memory(dtype: torch.dtype, tolerance: float) -> None:
    layers = GatedLayers(dtype)
    model = onegraph.compile(layers, dynamic_shapes=SHAPES)
    for size in SIZES:
        x = inputs(size, dtype)
        for found, expected in zip(model(x), layers(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    explanation = model.explain()
    assert len(explanation.pieces) == 1
    assert sum(note.startswith("linear 32 -> 96") for note in explanation.notes) == 1
    buffers = explanation.buffers
    assert buffers is not None and buffers.sizes == {"u0": 64}


def test_a_call_allocates_its_results_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "dispatcher_is_watched", lambda: False)  # the profiler looks on, as nobody does else
    model = onegraph.compile(GatedLayers(), dynamic_shapes=SHAPES)
    x = inputs(7)
    for _ in range(2):
        model(x)
    kept = [7 * 32 * 4, 7 * 40 * 4]
    assert allocations(lambda: model(x)) == kept


def test_halves_are_read_where_they_lie(fresh_cache: Path) -> None:
    """Without a kernel that copies them, and without a call through the dispatcher."""
    onegraph.compile(GatedLayers(), dynamic_shapes=SHAPES)(inputs(7))
    (wrapper,) = [
        text
        for path in (fresh_cache / "blobs").rglob("*")
        if path.is_file() and "def call" in (text := path.read_text(errors="ignore"))
    ]
    calls = [line.strip() for line in wrapper.splitlines() if line.strip().startswith("own_ops.linear(")]
    assert len(calls) == 5 and "torch.ops.onegraph" not in wrapper
    assert calls[-1].startswith("own_ops.linear(reinterpret_tensor(")


def test_without_the_kernels_the_reference_runs(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_implemented", {})
    layers = GatedLayers()
    model = onegraph.compile(layers, dynamic_shapes=SHAPES)
    for size in SIZES:
        torch.testing.assert_close(model(inputs(size)), layers(inputs(size)), rtol=1e-4, atol=1e-3)
    assert not any(note.startswith("linear") for note in model.explain().notes)


def test_below_torch_compile(fresh_cache: Path) -> None:
    torch._dynamo.reset()
    layers = GatedLayers()
    model = torch.compile(layers, backend="onegraph")
    torch.testing.assert_close(model(inputs(7)), layers(inputs(7)), rtol=1e-4, atol=1e-3)


PROGRAM = """
import json, torch, onegraph
from onegraph import linear_kernels
from onegraph.counters import counters
from tests.pipeline.test_linear import SHAPES, SIZES, GatedLayers, inputs

linear_kernels._threads_answer = lambda: True
with torch.no_grad():
    layers = GatedLayers()
    model = onegraph.compile(layers, dynamic_shapes=SHAPES)
    for size in SIZES:
        torch.testing.assert_close(model(inputs(size)), layers(inputs(size)), rtol=1e-4, atol=1e-3)
print(json.dumps([counters.snapshot(), [note for note in model.explain().notes if note.startswith('linear ')]]))
"""


def test_a_fresh_process_measures_and_compiles_nothing(fresh_cache: Path) -> None:
    def start() -> tuple[dict[str, int], list[str]]:
        run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=dict(os.environ))
        assert run.returncode == 0, run.stderr
        counted, kernels = json.loads(run.stdout.splitlines()[-1])
        return counted, kernels

    cold, measured = start()
    warm, read = start()
    assert cold["linear_shapes_measured"] == 3 and cold["inductor_compiles"] == 1
    assert "linear_shapes_measured" not in warm and "inductor_compiles" not in warm and "gxx_runs" not in warm
    assert read == measured and len(read) == 3 and warm["store_hits"] == 1
