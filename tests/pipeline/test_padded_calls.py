"""Library calls that are padded to a recorded size: each policy, what stands in the padding, and what can't be cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.counters import counters
from onegraph.errors import ConfigError, RecordingError

TOKENS = Dim("num_tokens", min=1, max=64)
RECORDED: dict[str, Any] = {"backend": "eager", "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 4, 8]}
"""Pieces that run op by op: what is tested here is the same for all backends, and this one needs no compiler."""

PADDED_TO_8 = {"replays:FULL": 1, "padded_calls:FULL": 1, "padding_rows:FULL": 3}


class Block(nn.Module):
    """A normalised layer with a residual, as most are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.silu(self.linear(self.norm(x)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def padded(module: Any, padding: dict[str, Any], example: dict[str, Any] | None = None, **more: Any) -> Any:
    dynamic = more.pop("dynamic", {"x": {0: TOKENS}})
    config = {**RECORDED, "cudagraph_padding": padding, **more}
    compiled = onegraph.compile(module, dynamic_shapes=dynamic, config=config)
    with torch.inference_mode():
        compiled.warm_up(example or {"x": torch.randn(3, 16)})
    return compiled


def poison(compiled: Any, *, with_nan: bool = True) -> None:
    """Fills the recordings' inputs with what no output may show: NaN, and numbers that index nothing."""
    with torch.inference_mode():
        for size in (1, 4, 8):
            for slot in compiled.slots(size).values():
                slot.fill_((float("nan") if with_nan else 1e30) if slot.is_floating_point() else 10**6)


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("policy", ["keep", "zero", "last", 7])
def test_a_call_between_sizes_runs_at_the_next_one(policy: Any, backend: str, mode: str) -> None:
    module = Block()
    compiled = padded(module, {"x": policy}, backend=backend, cudagraph_mode=mode)
    plain = onegraph.compile(module, dynamic_shapes={"x": {0: TOKENS}}, config={"backend": backend})
    counted = {f"replays:{mode}": 1, f"padded_calls:{mode}": 1, f"padding_rows:{mode}": 3}
    with torch.inference_mode():
        poison(compiled)
        x = torch.randn(5, 16)
        with counters.expect(**counted):
            found = compiled(x)
        whole = compiled.slots(8)["x"]
        assert torch.equal(whole[:5], x)
        filled = {"keep": whole.new_full((3, 16), float("nan")), "zero": whole.new_zeros(3, 16)}
        filled |= {"last": x[4:].expand(3, 16), 7: whole.new_full((3, 16), 7)}
        torch.testing.assert_close(whole[5:], filled[policy], equal_nan=True, rtol=0, atol=0)
        assert found.shape == (5, 16) and torch.equal(found, plain(whole.clone())[:5])
        torch.testing.assert_close(found, module(x))
        kept = found.clone()
        compiled(torch.randn(6, 16))
        assert torch.equal(found, kept)


def test_slots_of_a_size_that_is_not_recorded() -> None:
    module = Block()
    compiled = padded(module, {"x": "zero"})
    slots = compiled.slots(5)
    with torch.inference_mode():
        for _ in range(2):
            slots["x"].copy_(torch.randn(5, 16))
            with counters.expect(**PADDED_TO_8):
                found = compiled(**slots)
            torch.testing.assert_close(found, module(slots["x"]))


def test_the_front_of_a_recorded_input_is_filled_in_place() -> None:
    compiled = padded(Block(), {"x": "last"})
    whole = compiled.slots(8)["x"]
    with torch.inference_mode():
        poison(compiled)
        front = whole[:5].copy_(torch.randn(5, 16))
        torch.testing.assert_close(compiled(front), compiled.original(front))
        assert torch.equal(whole[5:], front[4:].expand(3, 16))
        shifted = whole.copy_(torch.randn(8, 16))[2:7]
        expected = compiled.original(shifted.clone())
        torch.testing.assert_close(compiled(shifted), expected)  # it is read before it is overwritten


def test_sizes_above_the_largest_run_without_a_recording() -> None:
    compiled = padded(Block(), {"x": "zero"})
    with torch.inference_mode(), counters.expect(**{"unrecorded_calls:above_largest": 1, "replays:FULL": 0}):
        compiled(torch.randn(9, 16))
    with torch.no_grad(), counters.expect(**{"unrecorded_calls:other_inference_mode": 1, "replays:FULL": 0}):
        compiled(torch.randn(5, 16))


class Lookup(nn.Module):
    """An embedding, of ids that have to be in range."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.table(ids) * scale[:, None]


@pytest.mark.parametrize("policy", ["zero", "last", 9])
def test_ids_that_are_out_of_range_are_read_nowhere(policy: Any) -> None:
    module, shapes = Lookup(), {"ids": {0: TOKENS}, "scale": {0: TOKENS}}
    example = {"ids": torch.zeros(3, dtype=torch.long), "scale": torch.ones(3)}
    compiled = padded(module, {"ids": policy, "scale": "keep"}, example, dynamic=shapes)
    with torch.inference_mode():
        poison(compiled)
        ids, scale = torch.randint(10, (5,)), torch.randn(5)
        with counters.expect(**PADDED_TO_8):
            found = compiled(ids, scale)
        assert torch.equal(found, module(ids, scale))


def test_two_results_of_which_one_has_no_rows() -> None:
    class Rows(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * scale, scale + 1

    compiled = padded(
        Rows(), {"x": "zero"}, {"x": torch.randn(3, 16), "scale": torch.ones(16)}, on_memory_change="rerecord"
    )
    with torch.inference_mode():
        for _ in range(2):
            x, scale = torch.randn(5, 16), torch.randn(16)
            rows, other = compiled(x, scale)  # the first records size 8 again, for the other scale
            assert torch.equal(rows, x * scale) and torch.equal(other, scale + 1)
        with counters.expect(**PADDED_TO_8):
            rows, other = compiled(x.clone(), scale)
        assert rows.shape == (5, 16) and torch.equal(rows, x * scale) and torch.equal(other, scale + 1)


def test_results_of_columns_and_of_the_size_itself() -> None:
    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
            return (x + 1).t(), (x * 2).sum(1), x[:, :, None] * x[:, None, :], x.shape[0], x

    compiled = padded(Turned(), {"x": "last"})
    with torch.inference_mode(), counters.expect(**PADDED_TO_8):
        x = torch.randn(5, 16)
        found, expected = compiled(x), Turned()(x)
        for one, other in zip(found[:3], expected[:3], strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()
        assert found[3] == 5 and found[4] is x


def test_columns_that_are_padded() -> None:
    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x.t() * 2

    for policy in ("zero", "last", "keep"):
        compiled = padded(Turned(), {"x": policy}, {"x": torch.randn(16, 3)}, dynamic={"x": {1: TOKENS}})
        with torch.inference_mode(), counters.expect(**PADDED_TO_8):
            poison(compiled)
            x = torch.randn(16, 5)
            first, second = compiled(x)
            assert torch.equal(first, x + 1) and first.is_contiguous()
            assert torch.equal(second, x.t() * 2) and second.stride() == (x.t() * 2).stride()


def test_a_square_is_padded_at_both_sides() -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return mask @ x

    shapes = {"x": {0: TOKENS}, "mask": {0: TOKENS, 1: TOKENS}}
    example = {"x": torch.randn(3, 16), "mask": torch.ones(3, 3)}
    compiled = padded(Mixed(), {"x": "zero", "mask": "zero"}, example, dynamic=shapes)
    with torch.inference_mode(), counters.expect(**PADDED_TO_8):
        poison(compiled)
        x, mask = torch.randn(5, 16), torch.rand(5, 5)
        torch.testing.assert_close(compiled(x, mask), mask @ x)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x])


def behind_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(1, 16)])


def flat(x: torch.Tensor) -> torch.Tensor:
    return (x + 1).reshape(-1)


@pytest.mark.parametrize("function", [doubled, behind_one, flat])
def test_a_result_that_follows_otherwise_is_not_cut(function: Any) -> None:
    compiled = padded(function, {"x": "zero"})
    with torch.inference_mode(), counters.expect(**{"unrecorded_calls:result_size_follows_otherwise": 1}):
        x = torch.randn(5, 16)
        assert torch.equal(compiled(x), function(x))
    why = [one["why"] for one in compiled.explain().to_dict()["plan"]["uncovered"]]
    assert any("result_size_follows_otherwise" in one for one in why)


def test_an_output_that_shows_the_input_is_not_padded() -> None:
    compiled = padded(lambda x: (x[:, :4], x + 1), {"x": "zero"})
    with torch.inference_mode(), counters.expect(**{"unrecorded_calls:output_shows_input": 1}):
        x = torch.randn(5, 16)
        shown, _ = compiled(x)
        assert shown.data_ptr() == x.data_ptr()


def test_results_share_what_they_share() -> None:
    def views(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + 1
        return y, y[:, 2:]

    compiled = padded(views, {"x": "zero"})
    with torch.inference_mode(), counters.expect(**PADDED_TO_8):
        x = torch.randn(5, 16)
        y, part = compiled(x)
        y.fill_(3)
        assert (part == 3).all() and part.shape == (5, 14)


def test_nested_inputs() -> None:
    class Nested(nn.Module):
        def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            return {"sum": batch["rows"][0] + batch["rows"][1], "scaled": batch["rows"][1] * batch["scale"]}

    shapes = {"batch": {"rows": [{0: TOKENS}, {0: TOKENS}], "scale": None}}
    scale = torch.randn(16)

    def batch(size: int) -> dict[str, Any]:
        return {"rows": [torch.randn(size, 16), torch.randn(size, 16)], "scale": scale}

    compiled = padded(
        Nested(),
        {"batch['rows'][0]": "zero", "batch['rows'][1]": "last"},
        {"batch": batch(3)},
        dynamic=shapes,
    )
    with torch.inference_mode(), counters.expect(**PADDED_TO_8):
        poison(compiled)
        given = batch(5)
        found, expected = compiled(given), Nested()(given)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    buffers = compiled.explain().to_dict()["plan"]["buffers"]
    assert [(one["name"], one["padding"]) for one in buffers] == [
        ("batch['rows'][0]", "zero"),
        ("batch['rows'][1]", "last"),
    ]


class Cached(nn.Module):
    """Writes its rows into a cache, at their slots."""

    def forward(self, x: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        new = x.view(-1, 2, 8)
        torch.ops.onegraph.write_kv_cache(new, new * 2, k, v, slots)
        return x + 1


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_padding_is_written_into_no_block(mode: str, op_kernels: None) -> None:
    k, v = torch.zeros(4, 4, 2, 8), torch.zeros(4, 4, 2, 8)
    example = {"x": torch.randn(3, 16), "slots": torch.tensor([0, 1, 2]), "k": k, "v": v}
    compiled = padded(
        Cached(),
        {"x": "keep", "slots": -1},
        example,
        dynamic={"x": {0: TOKENS}, "slots": {0: TOKENS}},
        cudagraph_mode=mode,
        splitting_ops=["onegraph::write_kv_cache"] if mode == "PIECEWISE" else [],
    )
    with torch.inference_mode():
        poison(compiled)
        for size in (4, 8):
            compiled.slots(size)["slots"].copy_(torch.arange(size))  # slots of blocks that somebody holds
        k.copy_(torch.randn(k.shape))
        v.copy_(torch.randn(v.shape))
        before, x = (k.clone(), v.clone()), torch.randn(5, 16)
        with counters.expect(**{f"padded_calls:{mode}": 1}):
            found = compiled(x, torch.tensor([3, 9, -1, 12, 15]), k, v)
        assert torch.equal(found, x + 1)
        new, written = x.view(5, 2, 8), torch.tensor([3, 9, 12, 15])
        rows = new[torch.tensor([0, 1, 3, 4])]
        for cache, was, values in zip((k, v), before, (rows, rows * 2), strict=True):
            expected = was.clone()
            expected.view(16, 2, 8)[written] = values
            assert torch.equal(cache, expected)


def test_a_warm_start_pads_as_a_cold_one(fresh_cache: Any) -> None:
    def answer() -> tuple[torch.Tensor, dict[str, Any]]:
        torch.manual_seed(1)
        compiled = padded(Block(), {"x": "last"}, backend="inductor", compile_cache_save_format="binary")
        with torch.inference_mode(), counters.expect(**PADDED_TO_8):
            return compiled(torch.randn(5, 16)), compiled.explain().to_dict()

    with counters.expect(index_misses=1, index_hits=0):
        cold, told = answer()
    with counters.expect(index_misses=0, index_hits=1, graphs_captured=0):
        warm, told_warm = answer()
    assert torch.equal(cold, warm) and told["plan"]["buffers"] == told_warm["plan"]["buffers"]
    with counters.expect(index_hits=1):  # padding is nothing that is compiled
        padded(Block(), {"x": "zero"}, backend="inductor", compile_cache_save_format="binary")


def test_a_saved_model_pads(tmp_path: Any, fresh_cache: Any) -> None:
    module = Block()
    padded(module, {"x": "zero"}, backend="inductor").save(tmp_path / "model.onegraph")
    loaded = onegraph.load(tmp_path / "model.onegraph", module)
    with torch.inference_mode():
        loaded.warm_up(torch.randn(3, 16))
        x = torch.randn(5, 16)
        with counters.expect(**PADDED_TO_8):
            torch.testing.assert_close(loaded(x), module(x))


def test_a_size_that_is_recorded_lazily_is_padded_to() -> None:
    module = Block()
    compiled = padded(module, {"x": "zero"}, cudagraph_lazy=True)
    with torch.inference_mode():
        x = torch.randn(5, 16)
        with counters.expect(**{"recordings:FULL": 1, "replays:FULL": 0, "padded_calls:FULL": 1}):
            torch.testing.assert_close(compiled(x), module(x))
        with counters.expect(**{"recordings:FULL": 0, "replays:FULL": 2, "padded_calls:FULL": 1}):
            torch.testing.assert_close(compiled(x), module(x))
            compiled(torch.randn(8, 16))


def test_debug_compares_with_the_padded_call() -> None:
    compiled = padded(Block(), {"x": "keep"}, cudagraph_debug=True, cudagraph_check="always")
    with torch.inference_mode(), counters.expect(**PADDED_TO_8):
        x = torch.randn(5, 16)
        torch.testing.assert_close(compiled(x), compiled.original(x))
    held = compiled.slots(8)
    with torch.inference_mode():
        kept = compiled(**held)
        with pytest.raises(RecordingError, match="still held"):
            compiled(torch.randn(5, 16))
        del kept
        compiled(torch.randn(5, 16))


def test_a_weight_that_moved_is_named_or_recorded_again() -> None:
    module = Block()
    compiled, again = padded(module, {"x": "zero"}), padded(module, {"x": "zero"}, on_memory_change="rerecord")
    module.linear.weight = nn.Parameter(torch.randn(16, 16))
    with torch.inference_mode():
        x = torch.randn(5, 16)
        with pytest.raises(RecordingError, match=r"linear\.weight"):
            compiled(x)
        with counters.expect(**{"recordings:FULL": 1, "padded_calls:FULL": 1, "replays:FULL": 0}):
            torch.testing.assert_close(again(x), module(x))
        with counters.expect(**PADDED_TO_8):
            torch.testing.assert_close(again(x), module(x))


@pytest.mark.parametrize("config", [{"compile_sizes": [8]}, {"dynamic_shapes": "backed"}], ids=str)
def test_sizes_with_artifacts_and_traces_of_their_own(config: dict[str, Any]) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, y * 2

    shapes = {"x": {0: TOKENS}, "y": {0: TOKENS}}
    example = {"x": torch.randn(3, 16), "y": torch.randn(3, 16)}
    compiled = padded(Two(), {"x": "zero", "y": "last"}, example, dynamic=shapes, **config)
    with torch.inference_mode(), counters.expect(**{"padded_calls:FULL": 3}):
        for size in (2, 5, 7):
            x, y = torch.randn(size, 16), torch.randn(size, 16)
            found = compiled(x, y)
            assert torch.equal(found[0], x + 1) and torch.equal(found[1], y * 2)


def test_what_is_padded_is_told() -> None:
    compiled = padded(Block(), {"x": "zero"})
    plan = compiled.explain().to_dict()["plan"]
    assert plan["buffers"] == [{"name": "x", "dtype": "float32", "shape": ["num_tokens", "16"], "padding": "zero"}]
    assert plan["padded"] == [
        {"range": [2, 3], "size": 4, "mode": "FULL", "share": 0.375},
        {"range": [5, 7], "size": 8, "mode": "FULL", "share": 0.25},
    ]
    assert [one["range"] for one in plan["uncovered"]] == [[9, 64]]
    assert "padded: 2..3 as 4 (38%), 5..7 as 8 (25%); with x zero" in str(compiled.explain())
    without = onegraph.compile(Block(), dynamic_shapes={"x": {0: TOKENS}}, config=RECORDED)
    with torch.inference_mode():
        without.warm_up(torch.randn(3, 16))
    plan = without.explain().to_dict()["plan"]
    assert plan["padded"] == [] and plan["buffers"][0]["padding"] is None
    assert [one["range"] for one in plan["uncovered"]] == [[2, 3], [5, 7], [9, 64]]


class Table(nn.Module):
    """Adds a table that the caller passes, and writes into `y`, if it shall."""

    def __init__(self, *, writes: bool = False) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, x: torch.Tensor, y: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        if self.writes:
            y.add_(1)
        return x + y + table


@pytest.mark.parametrize(
    ("padding", "told"),
    [
        ({"x": "zero", "y": "zero", "tabel": "zero"}, "'tabel', and no argument of that name has a dynamic dim"),
        ({"x": "zero", "y": "zero", "table": "zero"}, "'table', and no argument of that name has a dynamic dim"),
        ({"x": "zero"}, "no policy for y, which has the dim num_tokens too"),
        ({"x": "zero", "y": 1 << 40}, "y is int32, which can't be 1099511627776"),
    ],
)
def test_policies_that_fit_no_argument(padding: dict[str, Any], told: str) -> None:
    example = {"x": torch.randn(3, 16), "y": torch.ones(3, 16, dtype=torch.int32), "table": torch.randn(16)}
    with pytest.raises(ConfigError, match=told) as raised:
        padded(Table(), padding, example, dynamic={"x": {0: TOKENS}, "y": {0: TOKENS}})
    assert raised.value.hint


def test_an_argument_that_is_written_can_not_be_padded() -> None:
    example = {"x": torch.randn(3, 16), "y": torch.randn(3, 16), "table": torch.randn(16)}
    with pytest.raises(ConfigError, match="the module writes into y"):
        padded(Table(writes=True), {"x": 0, "y": 0}, example, dynamic={"x": {0: TOKENS}, "y": {0: TOKENS}})


def test_one_tensor_at_two_places_has_one_policy() -> None:
    x, table, shapes = torch.randn(3, 16), torch.randn(16), {"x": {0: TOKENS}, "y": {0: TOKENS}}
    example = {"x": x, "y": x, "table": table}
    with pytest.raises(ConfigError, match="y is the same tensor as x"):
        padded(Table(), {"x": "zero", "y": "last"}, example, dynamic=shapes)
    compiled = padded(Table(), {"x": "zero", "y": "zero"}, example, dynamic=shapes)
    with torch.inference_mode(), counters.expect(**PADDED_TO_8):
        y = torch.randn(5, 16)
        assert torch.equal(compiled(y, y, table), y + y + table)


@pytest.mark.parametrize("policy", [-1.0, "zeros", True, None, [0]])
def test_what_is_no_policy(policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"cudagraph_padding\.x=") as raised:
        padded(Block(), {"x": policy})
    assert "keep, zero, last or a whole number" in (raised.value.hint or "")


def test_padding_is_about_one_dim() -> None:
    shapes = {"x": {0: TOKENS}, "y": {0: Dim("rows", min=1, max=8)}}
    config = {"backend": "eager", "cudagraph_mode": "FULL", "cudagraph_padding": {"x": "zero"}}
    compiled = onegraph.compile(lambda x, y: (x + 1, y + 1), dynamic_shapes=shapes, config=config)
    with pytest.raises(ConfigError, match="one dynamic dim, and there are 2"), torch.inference_mode():
        compiled.warm_up(torch.randn(3, 16), torch.randn(3, 16))


def test_no_last_row() -> None:
    dynamic = {"x": {0: Dim("num_tokens", min=0, max=64)}}
    compiled = padded(Block(), {"x": "last"}, dynamic=dynamic)
    zeros = padded(Block(), {"x": "zero"}, dynamic=dynamic)
    with torch.inference_mode():
        with counters.expect(**{"unrecorded_calls:no_last_row": 1}):
            assert compiled(torch.randn(0, 16)).shape == (0, 16)
        with counters.expect(**{"padded_calls:FULL": 1, "padding_rows:FULL": 1}):
            assert zeros(torch.randn(0, 16)).shape == (0, 16)
