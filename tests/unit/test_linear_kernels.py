"""The choice of a kernel for each linear layer: by time, by results, from the store, or by rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from onegraph import linear_kernels
from onegraph.counters import counters
from onegraph.ir.linear import TOKENS, LinearShape
from onegraph.linear_kernels import choose_linear_kernels, linear_shapes, measure
from onegraph.ops import library
from onegraph.store.store import Store
from onegraph.targets.cpu.target import CpuTarget

SHAPE = LinearShape(24, 16, torch.float32)


@dataclass
class FakeOp:
    """Kernels whose seconds are what `costs` says for a number of tokens, on the test's own clock."""

    costs: Mapping[str, Callable[[int], float]]
    breaks: Mapping[str, float] = field(default_factory=dict)
    now: float = 0.0
    chosen: dict[LinearShape, tuple[str, ...]] = field(default_factory=dict)
    runs: list[tuple[str, int]] = field(default_factory=list)
    places: set[int] = field(default_factory=set)

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise AssertionError("only kernels are measured")

    def kernels(self, dtype: torch.dtype) -> tuple[str, ...]:
        return tuple(self.costs) if dtype == torch.float32 else ("plain",)

    def rule(self, dtype: torch.dtype) -> tuple[str, ...]:
        return ("plain",) * len(TOKENS)

    def run(self, kernel: str, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, weight.t(), out=out)
        out[-1, -1] += self.breaks.get(kernel, 0) * (len(x) == 8)
        self.now += self.costs[kernel](len(x))
        self.runs.append((kernel, len(x)))
        self.places.add(weight.data_ptr())

    def choose(self, shape: LinearShape, kernels: tuple[str, ...]) -> None:
        self.chosen[shape] = kernels


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> FakeOp:
    """Vectors for few tokens, then matrices, then PyTorch's."""
    made = FakeOp({"plain": lambda t: 1e-3 + 1e-5 * t, "vector": lambda t: 2e-4 * t, "amx": lambda t: 5e-4 + 2e-5 * t})
    monkeypatch.setattr(linear_kernels, "_clock", lambda: made.now)
    monkeypatch.setattr(linear_kernels, "POOL_BYTES", 1 << 16)
    monkeypatch.setattr(linear_kernels, "_known", {})
    monkeypatch.setitem(library._implemented, ("linear", "CPU"), made)
    return made


def layers(*sizes: tuple[int, int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.fx.GraphModule:
    """A graph that calls the op with weights of these sizes."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for number, size in enumerate(sizes):
        weight = graph.placeholder(f"weight_{number}")
        weight.meta["val"] = torch.empty(size, device=device, dtype=dtype)
        x = graph.call_function(torch.ops.onegraph.linear.default, (x, weight, None))
    graph.output(x)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def test_the_fastest_is_chosen_for_each_number_of_tokens(op: FakeOp) -> None:
    (choice,) = measure([SHAPE], op)
    assert choice.kernels == ("vector", "vector", *("amx",) * 4, *("plain",) * 4)
    assert choice.seconds[0] == pytest.approx({"plain": 1.01e-3, "vector": 2e-4, "amx": 5.2e-4})
    assert "vector" not in choice.seconds[-1], "what only falls behind isn't measured any more"
    assert len(op.places) > 20, "a weight is met in memory, not in the cache"


def test_pytorch_stays_unless_another_is_clearly_faster(op: FakeOp) -> None:
    op.costs = {"plain": lambda t: 1e-3, "vector": lambda t: 0.98e-3, "amx": lambda t: 0.96e-3 if t == 8 else 1.1e-3}
    (choice,) = measure([SHAPE], op)
    assert choice.kernels == ("amx",) * 4 + ("plain",) * 6


def test_fewer_tokens_do_not_take_longer(op: FakeOp) -> None:
    """Where they seem to, the machine was busy with something else."""
    op.costs = {"plain": lambda t: 1e-3, "vector": lambda t: 8e-3 if t == 2 else 5e-4, "amx": lambda t: 2e-3}
    (choice,) = measure([SHAPE], op)
    assert choice.kernels == ("vector",) * len(TOKENS)


@pytest.mark.parametrize("broken", [1.0, torch.nan, torch.inf])
def test_a_kernel_with_wrong_results_is_left_out(op: FakeOp, broken: float) -> None:
    op.breaks = {"vector": broken}
    with counters.expect(linear_kernels_wrong=1):
        (choice,) = measure([SHAPE], op)
    assert set(choice.kernels) == {"amx", "plain"} and "vector" not in choice.seconds[0]


def test_a_large_weight_is_measured_in_part(op: FakeOp) -> None:
    (choice,) = measure([LinearShape(10000, 16, torch.float32)], op)
    assert choice.measured_outputs == 256
    assert choice.seconds[0]["vector"] == pytest.approx(2e-4 * 10000 / 256)


def test_a_busy_machine_is_left_to_the_rule(op: FakeOp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_kernels, "_threads_answer", lambda: False)
    with counters.expect(linear_shapes_measured=0):
        (choice,) = choose_linear_kernels(layers((24, 16)), CpuTarget(), Store(tmp_path))
    assert not choice.is_measured and op.chosen == {SHAPE: ("plain",) * 10} and not op.runs
    assert not list(tmp_path.rglob("*.json"))


def test_a_choice_is_kept_and_read(op: FakeOp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, target, store = layers((24, 16), (8, 24), (24, 16)), CpuTarget(), Store(tmp_path)
    with counters.expect(linear_shapes_measured=2):
        made = choose_linear_kernels(graph, target, store)
        assert choose_linear_kernels(graph, target, store) == made
    files = list((tmp_path / "autotuned/linear").rglob("*.json"))
    written = next(data for data in map(json.loads, map(Path.read_text, files)) if data["outputs"] == 24)
    assert written["tokens"]["1"]["kernel"] == "vector" and written["machine"]["threads"] == torch.get_num_threads()
    monkeypatch.setattr(linear_kernels, "_known", {})  # as in another process
    op.chosen.clear()
    with counters.expect(linear_shapes_measured=0):
        read = choose_linear_kernels(graph, target, store)
    assert [choice.kernels for choice in read] == [choice.kernels for choice in made] == list(op.chosen.values())


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '"amx"', "other kernels", "other shape"])
def test_a_bad_record_is_measured_anew(
    op: FakeOp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    graph, target, store = layers((24, 16)), CpuTarget(), Store(tmp_path)
    choose_linear_kernels(graph, target, store)
    (path,) = (tmp_path / "autotuned/linear").rglob("*.json")
    good = path.read_text()
    replaced = {
        "other kernels": good.replace("amx", "gone"),
        "other shape": good.replace('"outputs": 24', '"outputs": 9'),
    }
    path.write_text(replaced.get(damage, damage))
    monkeypatch.setattr(linear_kernels, "_known", {})
    with counters.expect(linear_shapes_measured=1):
        choose_linear_kernels(graph, target, store)
    assert json.loads(path.read_text())["tokens"] == json.loads(good)["tokens"]


def test_without_a_store_choices_last_as_long_as_the_process(op: FakeOp) -> None:
    with counters.expect(linear_shapes_measured=1):
        assert choose_linear_kernels(layers((24, 16)), CpuTarget(), None)
        assert choose_linear_kernels(layers((24, 16)), CpuTarget(), None)


def test_nothing_to_choose(op: FakeOp, monkeypatch: pytest.MonkeyPatch) -> None:
    target = CpuTarget()
    assert choose_linear_kernels(layers(), target, None) == ()
    assert choose_linear_kernels(layers((24, 16), dtype=torch.float16), target, None) == ()
    assert linear_shapes(layers((24, 16), device="meta"), target) == ()
    monkeypatch.delitem(library._implemented, ("linear", "CPU"))
    assert choose_linear_kernels(layers((24, 16)), target, None) == () and not op.runs
