"""Splitting: what becomes a piece, which pieces are one, what crosses a border, and how a piece falls back."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.counters import counters
from onegraph.errors import ConfigError
from tests.compiled_parts import piece_callables

ROWS = {"x": {0: Dim("rows", min=1, max=64)}}
AT_SIN = {"splitting_ops": ["torch.sin"]}


def started(function: Any, **config: Any) -> Any:
    """Compiled and run once, with the result compared with eager's."""
    compiled = onegraph.compile(function, dynamic_shapes=ROWS, config={"backend": "eager", **AT_SIN, **config})
    check(compiled, function)
    return compiled


def check(compiled: Any, function: Any) -> None:
    for rows in (5, 1, 64):
        x = torch.randn(rows, 4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x.clone()), function(x.clone()))


def kinds(compiled: Any) -> list[str]:
    return ["op" if piece.kind == "splitting_op" else "piece" for piece in compiled.explain().pieces]


def same_as(compiled: Any) -> list[int | None]:
    return [piece.same_as for piece in compiled.explain().pieces if piece.kind == "compiled"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x + self.down(torch.relu(self.up(x))))


class Tower(nn.Module):
    """A first piece, one for each two layers, and a last one."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.layers = nn.ModuleList([Layer() for _ in range(num_layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * 2
        for layer in self.layers:
            x = layer(x)
        return self.last(x).softmax(-1)


def test_equal_layers_are_compiled_once(fresh_cache: Any) -> None:
    tower = Tower(32).eval()
    with counters.expect(inductor_compiles=3, store_misses=3, store_hits=0):
        compiled = started(tower, backend="inductor")
    assert kinds(compiled).count("piece") == 33 and kinds(compiled).count("op") == 32
    assert same_as(compiled) == [None, None, *[2] * 30, None]
    assert len(re.findall(r"= __pieces\[\d+\]\(", compiled.explain().plan_source)) == 65
    with counters.expect(inductor_compiles=0, store_hits=3, gxx_runs=0):
        started(Tower(32).eval(), backend="inductor")
    text = str(compiled.explain())
    assert "65: 33 compiled, of which 3 differ, and 32 of splitting ops" in text
    assert "piece 2 (also 4, 6, 8 … 62) layers.1.up to layers.1" in text
    assert f"split at torch.sin at {__file__}:" in text


def test_where_two_pieces_differ_is_told() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        for scale in (2.0, 2.0, 3.0):
            x = torch.sin(torch.relu(x) * scale)
        return x

    pieces = started(function).explain().to_dict()["pieces"]
    assert [piece["same_as"] for piece in pieces if piece["kind"] == "compiled"] == [None, 0, None]
    assert "float:3.0" in pieces[4]["differs_from"] and "float:2.0" in pieces[4]["differs_from"]


def several_values(x: torch.Tensor) -> torch.Tensor:
    values, order = torch.sort(torch.relu(x), dim=1)
    return torch.sin(values) + order


def a_tuple_as_a_whole(x: torch.Tensor) -> torch.Tensor:
    parts = torch.relu(x).chunk(2, dim=1)
    return torch.cat([torch.sin(x), *parts], 1)


def sizes(x: torch.Tensor) -> Any:
    y = torch.relu(torch.cat([x, x]))
    z = torch.sin(x)
    return z + torch.full(x.size(), 2.0), y.new_zeros(size=y.size()) + y.shape[0], torch.ones((x.shape[0], 2, 3))


def float_of_a_size(x: torch.Tensor) -> torch.Tensor:
    scale = x.shape[0] ** -0.5
    return torch.sin(torch.relu(x) * scale) * scale


def random_draws(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.sin(torch.rand_like(x) + x) + torch.rand_like(x) * torch.randn(x.shape[0], 1)


def view_of_what_is_changed(x: torch.Tensor) -> torch.Tensor:
    base = torch.relu(x)
    part = base[:, 1:3]
    y = torch.sin(x)
    base.add_(y)
    return torch.sin(y) + part.sum() + base


def input_that_is_changed(x: torch.Tensor) -> torch.Tensor:
    y = torch.sin(x.mul_(2))
    x.add_(y)
    return torch.relu(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(
    "function",
    [several_values, a_tuple_as_a_whole, sizes, float_of_a_size, view_of_what_is_changed, input_that_is_changed],
)
def test_what_crosses_a_border_keeps_its_meaning(function: Callable[..., Any], backend: str) -> None:
    compiled = started(function, backend=backend)
    assert "op" in kinds(compiled)
    called, changed, as_eager = torch.randn(7, 4), torch.zeros(0), torch.zeros(0)
    changed, as_eager = called.clone(), called.clone()
    compiled(changed), function(as_eager)
    torch.testing.assert_close(changed, as_eager)


def test_a_random_op_keeps_its_order() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(torch.rand_like(x) + x) + torch.rand_like(x) * torch.randn(x.shape[0], 1)

    for backend in ("eager", "aot_eager", "inductor"):
        compiled = onegraph.compile(function, dynamic_shapes=ROWS, config={"backend": backend, **AT_SIN})
        x = torch.randn(6, 4)
        compiled(x)
        torch.manual_seed(5)
        found = compiled(x)
        torch.manual_seed(5)
        torch.testing.assert_close(found, function(x))
        assert len(kinds(compiled)) == 3


def test_items_stay_with_the_op_that_gives_them() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        values, order = torch.sort(torch.relu(x), dim=1)
        return values * 2 + order

    compiled = started(function, splitting_ops=["torch.sort"])
    assert kinds(compiled) == ["piece", "op", "piece"]
    assert "values, order = __pieces[1](__args)" in compiled.explain().plan_source


def test_splitting_ops_in_a_row_are_one_piece_with_the_views_between_them() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(torch.relu(x))
        return torch.relu(torch.sin(y.t().t().view(-1, 4)))

    assert kinds(started(function)) == ["piece", "op", "piece"]


def test_memory_that_is_made_in_front_keeps_layers_equal() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        buffers = [torch.empty_like(x) for _ in range(3)]
        for buffer in buffers:
            x = torch.relu(x) * 2
            torch.sin(x, out=buffer)
            x = buffer + 1
        return x

    compiled = started(function)
    assert same_as(compiled) == [None, None, 2, None]


def test_without_splitting_ops_there_is_one_piece() -> None:
    assert kinds(started(Tower(2).eval(), splitting_ops=[])) == ["piece"]


def test_an_op_that_the_model_never_calls_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'torch.sine', and the model never calls it(.|\n)*'torch.sin'"):
        started(sizes, splitting_ops=["torch.sine"])


def test_a_piece_runs_uncompiled_where_that_is_asked_for(fresh_cache: Any) -> None:
    compiled = started(Tower(2).eval(), backend="aot_eager", eager_pieces=[2])
    backends = [piece.backend for piece in compiled.explain().pieces if piece.kind == "compiled"]
    assert backends == ["aot_eager", "eager", "aot_eager"]
    assert compiled.explain().pieces[2].ranges[0].why == "asked for by eager_pieces"
    with pytest.raises(ConfigError, match="eager_pieces has 9, and the graph's pieces are 0..4"):
        started(Tower(2).eval(), eager_pieces=[9])


def test_a_piece_falls_back_on_demand_and_stays_so() -> None:
    tower = Tower(3).eval()
    compiled = started(tower, backend="aot_eager")
    compiled.fallback(piece=2, backend="eager")
    check(compiled, tower)
    backends = [piece.backend for piece in compiled.explain().pieces if piece.kind == "compiled"]
    assert backends == ["aot_eager", "eager", "aot_eager", "aot_eager"]
    assert compiled.explain().pieces[2].ranges[0].why == "asked for by fallback()"
    assert compiled.explain().pieces[4].same_as is None  # it still runs what it shared with piece 2
    tower.layers[0].up = nn.Linear(4, 8)
    check(compiled, tower)  # captured once more
    assert compiled.explain().pieces[2].backend == "eager"
    for piece, backend in ((99, "eager"), (2, "inductor")):
        with pytest.raises(ConfigError):
            compiled.fallback(piece=piece, backend=backend)


def test_a_piece_that_raises_is_demoted_and_said_so_once(caplog: pytest.LogCaptureFixture) -> None:
    tower = Tower(2).eval()
    compiled = started(tower, backend="aot_eager")

    def broken(inputs: list[Any]) -> Any:
        raise RuntimeError("an artifact that fails")

    piece_callables(compiled)[0][2] = broken
    x = torch.randn(3, 4)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="onegraph"), counters.expect(demoted_pieces=1):
        with pytest.raises(RuntimeError) as raised:
            compiled(x)
        assert compiled.demote(raised.value)
        torch.testing.assert_close(compiled(x), tower(x))
        assert not compiled.demote(ValueError("from elsewhere"))
    assert [r.getMessage() for r in caplog.records if "uncompiled" in r.getMessage()] == [
        "piece 2 runs uncompiled from now on: it raised RuntimeError: an artifact that fails"
    ]
    assert compiled.explain().pieces[2].ranges[0].why.startswith("it raised RuntimeError")


def test_pieces_are_built_together_and_a_recompiled_one_is_detached(fresh_cache: Path) -> None:
    def compiled() -> Any:
        tower = Tower(4).eval()
        made = onegraph.compile(tower, dynamic_shapes={"x": {0: Dim("rows", min=1, max=64)}}, config=AT_SIN)
        x = torch.randn(5, 4)
        with torch.no_grad():
            torch.testing.assert_close(made(x), tower(x))
        return made

    def libraries() -> dict[str, str]:
        manifests = [json.loads(path.read_text()) for path in (fresh_cache / "entries").rglob("manifest.json")]
        return {one["key"]: one["files"]["kernels.so"]["sha256"] for one in manifests if "kernels.so" in one["files"]}

    with counters.expect(inductor_compiles=3, gxx_runs=1):
        compiled()
    before = libraries()
    assert len(before) > 1 and len(set(before.values())) == 1
    recompiled = next(iter(before))
    shutil.rmtree(fresh_cache / "entries" / recompiled[:2] / recompiled)
    with counters.expect(inductor_compiles=1, gxx_runs=1, store_hits=2):
        compiled()
    after = libraries()
    assert after[recompiled] != before[recompiled]
    assert {key: one for key, one in after.items() if key != recompiled} == {
        key: one for key, one in before.items() if key != recompiled
    }
    with counters.expect(inductor_compiles=0, store_hits=3):
        compiled()
