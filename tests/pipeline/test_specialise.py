"""Specialising: sizes and ranges with artifacts of their own, which size runs which, and what can't be asked for."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.counters import counters
from onegraph.errors import ConfigError, ConstraintError, ShapeOutOfRangeError
from tests.compiled_parts import piece_callables
from tests.pipeline.test_split import AT_SIN, Tower

ROWS = {"x": {0: Dim("rows", min=1, max=256)}}


def compiled_tower(**config: Any) -> tuple[Any, nn.Module]:
    tower = Tower(4).eval()
    return onegraph.compile(tower, dynamic_shapes=ROWS, config={**AT_SIN, **config}), tower


def check(compiled: Any, module: Any, *sizes: int) -> None:
    for rows in sizes:
        x = torch.randn(rows, 4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))


def ranges_of(compiled: Any, piece: int = 0) -> list[tuple[Any, ...]]:
    return [(one["min"], one["max"], one["store"]) for one in compiled.explain().to_dict()["pieces"][piece]["ranges"]]


def test_ranges_by_their_ends_and_sizes_are_six_compiles_of_each_piece(fresh_cache: Any) -> None:
    asked = {"compile_ranges": [8, 32], "compile_sizes": [16, 64, 128]}
    one = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    with counters.expect(inductor_compiles=6, store_misses=6, dynamo_compiles=1):
        compiled = onegraph.compile(one, dynamic_shapes={"input": {0: ROWS["x"][0]}}, config=asked)
        check(compiled, one, 1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 256)
    boxes = [(16, 16), (64, 64), (128, 128), (1, 8), (9, 32), (33, 256)]
    assert ranges_of(compiled) == [(*box, "miss") for box in boxes]
    with counters.expect(inductor_compiles=0, store_hits=6, gxx_runs=0):
        again = onegraph.compile(one, dynamic_shapes={"input": {0: ROWS["x"][0]}}, config=asked)
        check(again, one, 1, 16, 33)
    assert ranges_of(again) == [(*box, "hit") for box in boxes]
    assert "where rows == 64, store hit" in str(again.explain())


def test_each_distinct_piece_is_compiled_for_each_region_and_for_the_rest(fresh_cache: Any) -> None:
    with counters.expect(inductor_compiles=9):
        compiled, tower = compiled_tower(compile_sizes=[1, 16])
        check(compiled, tower, 1, 2, 15, 16, 17, 256)
    assert ranges_of(compiled, 2) == [(1, 1, "miss"), (16, 16, "miss"), (1, 256, "miss")]
    assert ranges_of(compiled, 4) == ranges_of(compiled, 2)


def artifacts_run(compiled: Any, *sizes: int) -> Iterator[int]:
    """Which region's pieces a call of each size runs, as numbers of their order."""
    regions = piece_callables(compiled)
    ran: list[int] = []
    for index, pieces in enumerate(regions):
        call = pieces[0]
        pieces[0] = lambda inputs, call=call, index=index: (ran.append(index), call(inputs))[1]
    for rows in sizes:
        with torch.no_grad():
            compiled(torch.randn(rows, 4))
        yield ran[-1]
    assert len(ran) == len(sizes)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"compile_sizes": [16, 4]}, {1: 2, 3: 2, 4: 1, 5: 2, 15: 2, 16: 0, 17: 2, 256: 2}),
        ({"compile_ranges": [4, 16]}, {1: 0, 4: 0, 5: 1, 16: 1, 17: 2, 256: 2}),
        ({"compile_ranges": [[5, 6], [100, 200]]}, {1: 2, 4: 2, 5: 0, 6: 0, 7: 2, 99: 2, 100: 1, 200: 1, 201: 2}),
        ({"compile_ranges": [[5, 60]], "compile_sizes": [7]}, {5: 1, 6: 1, 7: 0, 8: 1, 60: 1, 61: 2, 1: 2}),
        ({"compile_ranges": [256]}, {1: 0, 256: 0}),
    ],
)
def test_a_size_runs_its_own_artifact_and_others_the_general_one(
    asked: dict[str, Any], expected: dict[int, int]
) -> None:
    compiled, tower = compiled_tower(backend="aot_eager", **asked)
    check(compiled, tower, *expected)
    assert dict(zip(expected, artifacts_run(compiled, *expected), strict=True)) == expected
    with torch.no_grad(), pytest.raises(ShapeOutOfRangeError):
        compiled(torch.randn(257, 4))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"compile_sizes": [257]}, "compile_sizes has 257, and rows is declared as 1..256"),
        ({"compile_sizes": [0]}, "compile_sizes has 0, and rows is declared as 1..256"),
        ({"compile_ranges": [[8, 400]]}, r"compile_ranges has 8..400, and rows is declared as 1..256"),
        ({"compile_ranges": [512]}, "compile_ranges has"),
        ({"compile_ranges": [[1, 8], [8, 9]]}, r"1\.\.8 and 8\.\.9, which overlap"),
        ({"compile_ranges": [8, [9, 12]]}, "both numbers and pairs"),
        ({"compile_sizes": ["cudagraph_capture_sizes"]}, "no sizes are recorded"),
        ({"compile_sizes": "cudagraph_capture_sizes"}, "no sizes are recorded"),
    ],
)
def test_sizes_that_cannot_be_served_are_errors(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(*compiled_tower(backend="aot_eager", **asked), 3)


def test_a_module_without_dynamic_dims_has_no_sizes_to_specialise() -> None:
    compiled = onegraph.compile(nn.ReLU(), config={"compile_sizes": [4], "backend": "aot_eager"})
    with pytest.raises(ConfigError, match="without dynamic dims"):
        compiled(torch.randn(4))


def test_a_graph_of_stock_torch_compile_has_no_range_to_specialise() -> None:
    torch._dynamo.reset()
    for name, value in (("compile_sizes", [4]), ("compile_ranges", [4])):
        stock = torch.compile(nn.ReLU(), backend="onegraph", options={name: value})
        with torch.no_grad(), pytest.raises(Exception, match=f"{name}=.*can't be honoured below Dynamo"):
            stock(torch.randn(4))


def test_a_size_makes_a_constant_and_a_range_keeps_what_was_known() -> None:
    """What the trace knows of sizes holds in a region, too: without it the division couldn't be compiled."""

    def function(x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[0] % 4 == 0)
        return x.view(x.shape[0] // 4, 4, -1).sum(1) + x.shape[0]

    dims = {"x": {0: Dim("rows", min=4, max=64)}}
    for config in ({"compile_sizes": [8]}, {"compile_ranges": [16]}):
        compiled = onegraph.compile(function, dynamic_shapes=dims, config={"backend": "aot_eager", **config})
        with pytest.raises(ConstraintError):
            compiled(torch.randn(8, 4))

    def always(x: torch.Tensor) -> torch.Tensor:
        return x[: x.shape[0] - x.shape[0] % 4].view(x.shape[0] // 4, 4, -1).sum(1) + x.shape[0]

    for config in ({"compile_sizes": [8, 9]}, {"compile_ranges": [16]}):
        compiled = onegraph.compile(always, dynamic_shapes=dims, config={"backend": "aot_eager", **config})
        check(compiled, always, 4, 8, 9, 16, 17, 63, 64)


def test_only_the_pieces_with_the_first_dim_are_specialised(fresh_cache: Any) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(x) * 2
        y = torch.sin(y)
        return x, torch.tanh(y) * 3

    dims = {"x": {0: Dim("rows", max=64)}, "y": {0: Dim("others", max=32)}}
    config = {"splitting_ops": ["torch.sin"], "compile_sizes": [1, 8]}
    with counters.expect(inductor_compiles=4):  # the first piece three times, the last one once
        compiled = onegraph.compile(function, dynamic_shapes=dims, config=config)
        for rows, others in ((1, 5), (8, 8), (64, 1), (5, 32)):
            x, y = torch.randn(rows, 4), torch.randn(others, 4)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, y), function(x, y))
    assert ranges_of(compiled, 0) == [(1, 1, "miss"), (8, 8, "miss"), (0, 64, "miss")]
    assert ranges_of(compiled, 2) == [(0, 64, "miss")]


def test_an_artifact_of_one_size_falls_back_alone() -> None:
    compiled, tower = compiled_tower(backend="aot_eager", compile_sizes=[16])
    check(compiled, tower, 3)
    compiled.fallback(piece=2, size=16)
    check(compiled, tower, 3, 16)
    piece = compiled.explain().to_dict()["pieces"][2]
    assert piece["backend"] == "aot_eager"
    assert [one["why"] for one in piece["ranges"]] == ["asked for by fallback()", "backend=aot_eager"]
    with pytest.raises(ConfigError, match="no artifact is for the size 300: rows is declared as 1..256"):
        compiled.fallback(piece=2, size=300)
    compiled.fallback(piece=2)
    check(compiled, tower, 3, 16)
    assert compiled.explain().to_dict()["pieces"][2]["backend"] == "eager"


@pytest.mark.parametrize("mode", ["backed", "backed_size_oblivious"])
def test_backed_sizes_get_artifacts_for_single_sizes(mode: str) -> None:
    compiled, tower = compiled_tower(backend="aot_eager", compile_sizes=[1, 16], dynamic_shapes=mode)
    check(compiled, tower, 1, 2, 16, 17, 256)


def test_slots_are_the_same_tensors_for_the_same_size() -> None:
    def function(x: torch.Tensor, pairs: list[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
        return x.sum(1) + pairs[0].sum(0) * scale

    rows = Dim("rows", max=64)
    compiled = onegraph.compile(
        function, dynamic_shapes={"x": {0: rows}, "pairs": [{1: rows}], "scale": None}, config={"backend": "eager"}
    )
    with pytest.raises(ConfigError, match="call warm_up first"):
        compiled.slots(4)
    compiled.warm_up({"x": torch.randn(3, 4), "pairs": [torch.randn(3, 2).t()], "scale": torch.ones(1)})
    slots = compiled.slots(5)
    assert {path: tuple(one.shape) for path, one in slots.items()} == {"x": (5, 4), "pairs[0]": (2, 5)}
    assert slots["pairs[0]"].stride() == (1, 2) and slots["x"].dtype is torch.float32
    assert compiled.slots(5)["x"] is slots["x"] and compiled.slots(6)["x"] is not slots["x"]
    slots["x"].copy_(torch.ones(5, 4))
    out = compiled(slots["x"], [slots["pairs[0]"]], torch.ones(1))
    assert torch.equal(out, torch.full((5,), 4.0))
    for size in (True, 3.0, "3"):
        with pytest.raises(ConfigError, match="no whole number"):
            compiled.slots(size)
    with pytest.raises(ShapeOutOfRangeError, match="rows = 65"):
        compiled.slots(65)
    with pytest.raises(ConfigError, match="one size for each of rows"):
        compiled.slots(5, columns=3)


@pytest.mark.parametrize(
    "example",
    [
        lambda: torch.randn(4, 8)[:, :3],
        lambda: torch.randn(4, 8)[:, ::2],
        lambda: torch.randn(8, 3)[::2],
        lambda: torch.randn(3, 4).t(),
        lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    ],
    ids=["slice", "step", "rows", "transposed", "permuted"],
)
def test_slots_are_laid_out_as_the_contract_wants(example: Any) -> None:
    compiled = onegraph.compile(
        lambda x: x * 2, dynamic_shapes={"x": {0: Dim("rows", max=64)}}, config={"backend": "eager"}
    )
    x = example()
    compiled(x)
    for rows in (0, 1, 5, 64):
        slots = compiled.slots(rows)
        slots["x"].copy_(torch.ones(rows, *x.shape[1:]))
        assert torch.equal(compiled(**slots), torch.full((rows, *x.shape[1:]), 2.0))


def test_slots_follow_a_recapture_and_twins_are_one() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * self.scale + y

    module, rows = Scaled(), Dim("rows", max=64)
    compiled = onegraph.compile(module, dynamic_shapes={"x": {0: rows}, "y": {0: rows}}, config={"backend": "eager"})
    x = torch.randn(3)
    compiled(x, x)
    slots = compiled.slots(4)
    assert slots["x"] is slots["y"] and torch.equal(compiled(**slots), torch.zeros(4))
    module.scale = 3
    compiled(x.double(), torch.ones(3).double())
    slots = compiled.slots(4)
    assert slots["x"] is not slots["y"] and slots["x"].dtype is torch.float64
    assert torch.equal(compiled(**slots), torch.zeros(4, dtype=torch.float64))
    expanded = onegraph.compile(
        lambda x: x + 1, dynamic_shapes={"x": {0: Dim("rows", max=64)}}, config={"backend": "eager"}
    )
    expanded(torch.ones(1, 3).expand(4, 3))
    with pytest.raises(ConfigError, match="no slot for x, which was expanded"):
        expanded.slots(4)


def test_a_fallback_that_nothing_fits_is_told_once_and_forgotten() -> None:
    compiled, tower = compiled_tower(backend="aot_eager")
    compiled.fallback(piece=99)
    with pytest.raises(ConfigError, match="there is no piece 99"):
        check(compiled, tower, 3)
    check(compiled, tower, 3)
    for piece, size in ((True, None), (1.0, None), (1, "8"), (1, 8.0)):
        with pytest.raises(ConfigError, match="no whole number"):
            compiled.fallback(piece, size=size)  # type: ignore[arg-type]


def test_a_range_that_cannot_be_made_is_told_and_served_by_what_is_shown() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, x.shape[0])) * 2

    config = {"backend": "aot_eager", "compile_sizes": [8], "compile_ranges": [3, 16]}
    compiled = onegraph.compile(function, dynamic_shapes={"x": {0: Dim("n", max=32)}}, config=config)
    check(compiled, function, 0, 3, 4, 8, 16, 17, 32)
    ranges = compiled.explain().to_dict()["pieces"][0]["ranges"]
    shown = {n for one in ranges for n in range(33) if eval(one["predicate"] or "True", {"n": n})}  # noqa: S307
    assert shown == set(range(33))


def test_a_predicate_that_divides_by_a_size_of_zero_is_false_there() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(torch.sin(x).chunk(2)[::-1])

    config = {"backend": "aot_eager", "on_constraint": "split", "dynamic_shapes": "backed"}
    compiled = onegraph.compile(function, dynamic_shapes={"x": {0: Dim("n", max=32)}}, config=config)
    check(compiled, function, 5, 0, 1, 2, 32)
