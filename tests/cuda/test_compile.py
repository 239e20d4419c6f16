"""`onegraph.compile` of modules on a GPU: every size, effects, errors, what is stored, recordings."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.api import torch_compile_backend
from onegraph.counters import counters

ROWS = Dim("rows", min=1, max=64)


class Block(nn.Module):
    """A gated layer with a norm, a buffer that counts, a cache that is written, and a structured result."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(size)
        self.up, self.gate, self.down = nn.Linear(size, 80), nn.Linear(size, 80), nn.Linear(80, size)
        self.register_buffer("calls", torch.zeros(1))
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor) -> Any:
        hidden = self.norm(x + positions[:, None].to(x.dtype) * 0.01)
        out = x + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))
        self.calls.add_(1)
        cache.add_(out.sum(0))
        return {"out": out, "same": x, "flat": x.view(-1), "sums": (out.float().sum(-1), None)}


def inputs(size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    x = torch.randn(size, 32, device="cuda", dtype=dtype)
    return x, torch.arange(size, device="cuda"), torch.zeros(32, device="cuda", dtype=dtype)


def compiled_block(config: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Block]:
    module = Block().to("cuda", dtype)
    reference = copy.deepcopy(module)
    shapes = {"x": {0: ROWS}, "positions": {0: ROWS}}
    return onegraph.compile(module, dynamic_shapes=shapes, config=config), reference


@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize("config", [1, 2, 3, {"backend": "aot_eager"}, {"backend": "eager"}], ids=str)
def test_results_and_effects_are_the_modules_own_at_every_size(config: Any, first: int) -> None:
    compiled, reference = compiled_block(config)
    for size in (first, 1, 2, 7, 63, 64):
        x, positions, cache = inputs(size)
        expected_cache = cache.clone()
        out, expected = compiled(x, positions, cache), reference(x, positions, expected_cache)
        torch.testing.assert_close(out["out"], expected["out"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out["sums"][0], expected["sums"][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache, expected_cache, rtol=1e-4, atol=1e-4)
        assert out["same"] is x and out["flat"].data_ptr() == x.data_ptr()
        assert torch.equal(compiled.original.calls, reference.calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    compiled, reference = compiled_block(dtype=dtype)
    for size in (1, 2, 64):
        x, positions, cache = inputs(size, dtype)
        out, expected = compiled(x, positions, cache), reference(x, positions, cache.clone())
        torch.testing.assert_close(out["out"], expected["out"], rtol=2e-2, atol=2e-2)


def test_nothing_is_compiled_after_the_first_call_and_artifacts_hold_the_kernels(fresh_cache: Path) -> None:
    compiled, _ = compiled_block()
    compiled(*inputs(5))
    (piece,) = compiled.explain().to_dict()["pieces"]
    assert piece["ranges"][0]["store"] == "miss", piece
    with counters.expect(dynamo_compiles=0, inductor_compiles=0, triton_builds=0):
        for size in (1, 2, 64):
            compiled(*inputs(size))
    manifests = [json.loads(path.read_text()) for path in (fresh_cache / "entries").rglob("manifest.json")]
    assert ["graph.txt.gz", "triton.zip", "wrapper.py"] in [sorted(manifest["files"]) for manifest in manifests]


def test_sizes_with_artifacts_of_their_own() -> None:
    compiled, reference = compiled_block({"compile_sizes": [8], "compile_ranges": [4]})
    for size in (1, 4, 5, 8, 64):
        x, positions, cache = inputs(size)
        expected = reference(x, positions, cache.clone())
        torch.testing.assert_close(compiled(x, positions, cache)["out"], expected["out"], rtol=1e-4, atol=1e-5)
    assert len(compiled.explain().to_dict()["pieces"][0]["ranges"]) == 3


def test_inputs_elsewhere_are_an_error() -> None:
    compiled, _ = compiled_block()
    x, positions, cache = inputs(4)
    compiled(x, positions, cache)
    with pytest.raises(onegraph.errors.OnegraphError, match="cpu"):
        compiled(x.cpu(), positions, cache)
    with pytest.raises(onegraph.errors.OnegraphError, match="align"):
        compiled(torch.randn(4 * 32 + 1, device="cuda")[1:].view(4, 32), positions, cache)


def test_a_weight_that_is_not_aligned_is_read_where_it_lies() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(65, device="cuda")[1:])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    module = Scale()
    compiled = onegraph.compile(module, dynamic_shapes={"x": {0: ROWS}})
    for weight in (
        module.weight,
        nn.Parameter(torch.randn(64, device="cuda")),
        nn.Parameter(torch.randn(67).cuda()[3:]),
    ):
        module.weight = weight
        x = torch.randn(3, 64, device="cuda")
        torch.testing.assert_close(compiled(x), x * weight)


def test_a_part_on_the_cpu() -> None:
    def mixed(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.relu() + y.to("cuda") * 2, y.sin() + 1

    compiled = onegraph.compile(mixed, dynamic_shapes={"x": {0: ROWS}, "y": {0: ROWS}})
    for size in (3, 1, 64):
        x, y = torch.randn(size, 8, device="cuda"), torch.randn(size, 8)
        for out, expected in zip(compiled(x, y), mixed(x, y), strict=True):
            torch.testing.assert_close(out, expected)


def test_below_torch_compile() -> None:
    module = Block().cuda()
    compiled = torch.compile(module, backend=torch_compile_backend)
    for size in (4, 9, 17):
        x, positions, cache = inputs(size)
        expected = module(x, positions, cache.clone())
        torch.testing.assert_close(compiled(x, positions, cache)["out"], expected["out"], rtol=1e-4, atol=1e-5)


def test_a_call_can_be_recorded_and_replayed_bit_for_bit() -> None:
    """Captured at the first call of this size: nothing is compiled, timed or waited for inside."""
    compiled, _ = compiled_block({"splitting_ops": ["torch.nn.functional.silu"]})
    compiled(*inputs(5))
    x, positions, cache = inputs(16)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        recorded = compiled(x, positions, cache)["out"]
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        cache.zero_()
        graph.replay()
        replayed, written = recorded.clone(), cache.clone()
        cache.zero_()
        assert torch.equal(replayed, compiled(x, positions, cache)["out"])
        assert torch.equal(written, cache)


PROGRAM = """
import json, sys, torch, onegraph
from onegraph.counters import counters
from torch import nn
from torch.export import Dim

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.RMSNorm(128), nn.Linear(128, 16)).cuda()
compiled = onegraph.compile(module, dynamic_shapes={"input": {0: Dim("num_tokens", min=1, max=32)}})
outputs = []
with torch.no_grad():
    for size in (5, 1, 32):
        x = torch.randn(size, 64, device="cuda")
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], module(x), rtol=1e-4, atol=1e-5)
facts = compiled.explain().to_dict()["pieces"][0]["ranges"][0]
total = [out.double().sum().item() for out in outputs]
print(json.dumps({"counters": counters.snapshot(), "total": total, **facts}))
"""


def start(root: Path, home: Path, **variables: str) -> dict[str, Any]:
    """Runs the program in a process of its own, whose user has an empty home."""
    home.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ONEGRAPH_", "TRITON_", "TORCHINDUCTOR_"))}
    environment |= {"ONEGRAPH_CACHE_ROOT": str(root), "HOME": str(home), "TMPDIR": str(home), **variables}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return facts


def test_a_warm_start_compiles_nothing_and_gives_the_same_bits(tmp_path: Path) -> None:
    """Without Inductor, without Triton's compiler, without a C compiler: all of it comes from the store."""
    cold = start(tmp_path / "root", tmp_path / "first")
    assert cold["store"] == "miss" and cold["counters"]["inductor_compiles"] == cold["counters"]["triton_builds"] == 1
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("gcc", "cc", "clang", "g++", "ptxas"):
        (binaries / name).write_text("#!/bin/sh\nexit 97\n")
        (binaries / name).chmod(0o755)
    warm = start(tmp_path / "root", tmp_path / "second", PATH=f"{binaries}:{os.environ['PATH']}")
    assert warm["store"] == "hit" and warm["key"] == cold["key"]
    assert not {"inductor_compiles", "triton_builds", "store_writes"} & set(warm["counters"])
    assert warm["total"] == cold["total"]
