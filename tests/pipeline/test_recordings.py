"""Recordings in library use: what is replayed, what each classic bug of recordings ends in, and what is told of it."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.counters import counters
from onegraph.errors import CaptureError, ConfigError, RecordingError
from onegraph.targets.cpu.tape import TapeRecording

TOKENS = Dim("num_tokens", min=1, max=64)
EAGER = {"backend": "eager", "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 4]}
"""Pieces that run op by op: what is tested here is the same for all backends, and this one needs no compiler."""


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


def recorded(module: Any, config: dict[str, Any] = EAGER, **others: Any) -> Any:
    compiled = onegraph.compile(module, dynamic_shapes={"x": {0: TOKENS}, **others.pop("dynamic", {})}, config=config)
    with torch.inference_mode():
        compiled.warm_up({"x": torch.randn(3, 16), **others})
    return compiled


def sizes(compiled: Any) -> list[tuple[int, str]]:
    return [(one["num_tokens"], one["mode"]) for one in compiled.explain().to_dict()["plan"]["sizes"]]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_replay_equals_the_plain_call(backend: str) -> None:
    module = Block()
    compiled = recorded(module, {**EAGER, "backend": backend})
    plain = onegraph.compile(module, dynamic_shapes={"x": {0: TOKENS}}, config={"backend": backend})
    assert sizes(compiled) == [(1, "FULL"), (4, "FULL")]
    with torch.inference_mode():
        for size in (4, 1, 4, 1):
            x = torch.randn(size, 16)
            with counters.expect(**{"replays:FULL": 1}):
                found = compiled(x)
            assert torch.equal(found, plain(x))
        with counters.expect(**{"replays:FULL": 0, "unrecorded_calls:size_not_recorded": 1}):
            x = torch.randn(5, 16)
            assert torch.equal(compiled(x), plain(x))


def test_results_of_a_call_on_tensors_of_ones_own_stay() -> None:
    compiled = recorded(Block())
    with torch.inference_mode():
        first, second = torch.randn(4, 16), torch.randn(4, 16)
        kept = compiled(first)
        copy = kept.clone()
        other = compiled(second)
        assert torch.equal(kept, copy) and not torch.equal(kept, other)


def test_slots_are_replayed_in_place() -> None:
    compiled = recorded(Block())
    slots = compiled.slots(4)
    with torch.inference_mode():
        slots["x"].copy_(torch.randn(4, 16))
        first = compiled(**slots)
        address, copy = first.data_ptr(), first.clone()
        slots["x"].copy_(torch.randn(4, 16))
        second = compiled(**slots)
        assert second.data_ptr() == address and not torch.equal(copy, second)
        assert torch.allclose(second, compiled.original(slots["x"]), atol=1e-6)


@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_below_a_splitting_op(mode: str) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.sort(self.first(x), 0).values)

    config = {**EAGER, "cudagraph_mode": mode, "splitting_ops": ["torch.sort"]}
    module = Split()
    compiled = recorded(module, config)
    assert sizes(compiled) == [(1, mode), (4, mode)]
    unrecorded = compiled.explain().to_dict()["plan"]["sizes"][1]["unrecorded"]
    assert [one["piece"] for one in unrecorded] == ([] if mode == "FULL" else [1])
    with torch.inference_mode():
        for size in (4, 1, 4):
            x = torch.randn(size, 16)
            with counters.expect(**{f"replays:{mode}": 1}):
                found = compiled(x)
            assert torch.allclose(found, module(x), atol=1e-6)
            kept = found.clone()
            compiled(torch.randn(size, 16))
            assert torch.equal(found, kept)


def failing(module: Any, *, config: dict[str, Any] = EAGER, **others: Any) -> RecordingError:
    with pytest.raises(RecordingError) as raised:
        recorded(module, config, **others)
    return raised.value


def test_random_numbers_are_named_with_their_line() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    error = failing(Noisy())
    assert "rand" in error.message and "FULL at size 4" in error.message
    assert error.where is not None and "test_recordings.py" in error.where


def test_a_host_counter_is_named_and_keeps_counting_between_pieces() -> None:
    calls = 0

    @torch.library.custom_op("recordings_test::counted", mutates_args=())
    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x * 2

    @counted.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.recordings_test.counted(x + 1) - 1

    error = failing(Counting())
    assert "recordings_test.counted" in error.message and "Python" in error.message
    assert error.where is not None and "test_recordings.py" in error.where
    config = {**EAGER, "cudagraph_mode": "PIECEWISE", "splitting_ops": ["recordings_test::counted"]}
    compiled = recorded(Counting(), config)
    with torch.inference_mode():
        before, x = calls, torch.randn(4, 16)
        for _ in range(3):
            assert torch.equal(compiled(x), (x + 1) * 2 - 1)
    assert calls == before + 3


@onegraph.opaque(fake=lambda x: torch.empty_like(x))
def signed(x: torch.Tensor) -> torch.Tensor:
    return x.clone() if x.sum().item() > 0 else -x


def test_a_branch_on_a_value_is_refused_at_capture_and_named_in_an_op() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    class Hidden(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return signed(x + 1)

    with pytest.raises(CaptureError, match="data-dependent|item"):
        recorded(Branching())
    error = failing(Hidden())
    assert "Python" in error.message
    assert error.where is not None and "test_recordings.py" in error.where


def test_an_op_that_is_tagged_unsafe_is_named() -> None:
    @torch.library.custom_op("recordings_test::unsafe", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
    def unsafe(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @unsafe.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Unsafe(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.recordings_test.unsafe(x)

    assert "recordings_test.unsafe" in failing(Unsafe()).message


class Table(nn.Module):
    """Adds a table that the caller passes."""

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x + table


def test_a_new_input_tensor_is_named() -> None:
    table = torch.randn(16)
    compiled = recorded(Table(), table=table)
    with torch.inference_mode():
        x = torch.randn(4, 16)
        table += 1  # the same memory
        assert torch.equal(compiled(x, table), x + table)
        with pytest.raises(RecordingError, match="table .input.*recorded at") as raised:
            compiled(x, torch.randn(16))
        assert raised.value.tensor == "table" and "on_memory_change=rerecord" in str(raised.value)


def test_a_freed_buffer_is_named_as_freed() -> None:
    table = torch.randn(16)
    compiled = recorded(Table(), {**EAGER, "backend": "inductor"}, table=table)
    other = torch.randn(16)
    del table
    gc.collect()
    with torch.inference_mode(), pytest.raises(RecordingError, match="was freed"):
        compiled(torch.randn(4, 16), other)


def replace(module: nn.Module) -> None:
    module.linear.weight = nn.Parameter(torch.randn(16, 16))


def point_elsewhere(module: nn.Module) -> None:
    module.linear.weight.data = torch.randn(16, 16)


def fill(module: nn.Module) -> None:
    with torch.no_grad():
        module.linear.weight.copy_(torch.randn(16, 16))


def load(module: nn.Module) -> None:
    module.load_state_dict({name: torch.randn_like(value) for name, value in module.state_dict().items()})


def load_and_assign(module: nn.Module) -> None:
    state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [fill, load])
def test_weights_that_are_changed_in_place_are_seen(change: Callable[[nn.Module], None]) -> None:
    module = Block()
    compiled = recorded(module)
    with torch.inference_mode():
        x = torch.randn(4, 16)
        before = compiled(x)
    change(module)
    with torch.inference_mode(), counters.expect(**{"replays:FULL": 1}):
        after = compiled(x)
        assert torch.allclose(after, module(x), atol=1e-6) and not torch.equal(before, after)


@pytest.mark.parametrize("change", [replace, point_elsewhere, load_and_assign])
def test_a_weight_that_lies_elsewhere_is_named_or_recorded_again(change: Callable[[nn.Module], None]) -> None:
    module = Block()
    compiled = recorded(module)
    again = recorded(module, {**EAGER, "on_memory_change": "rerecord"})
    change(module)
    with torch.inference_mode():
        x = torch.randn(4, 16)
        with pytest.raises(RecordingError, match="weight") as raised:
            compiled(x)
        assert raised.value.tensor is not None and raised.value.tensor.startswith(("linear.", "norm."))
        with counters.expect(**{"recordings:FULL": 1, "replays:FULL": 0}):
            assert torch.allclose(again(x), module(x), atol=1e-6)
        with counters.expect(**{"recordings:FULL": 0, "replays:FULL": 1}):
            assert torch.allclose(again(x), module(x), atol=1e-6)


class Projections(nn.Module):
    """Three layers of one input, whose weights are merged into one block."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.k(x) + self.v(x)


@pytest.mark.parametrize("on_change", ["error", "rerecord"])
def test_merged_weights_that_are_merged_anew_are_named_or_recorded_again(on_change: str) -> None:
    module = Projections()
    config = {**EAGER, "on_memory_change": on_change}
    compiled = onegraph.compile(module, dynamic_shapes={"x": {0: TOKENS}}, config=config, own_weights=True)
    with torch.inference_mode():
        compiled.warm_up(torch.randn(3, 16))
        names = [use["name"] for use in compiled.explain().to_dict()["plan"]["memory"]]
        assert len(names) == 1 and "merged" in names[0]
        x = torch.randn(4, 16)
        with counters.expect(**{"replays:FULL": 1}):
            assert torch.allclose(compiled(x), module(x), atol=1e-5)
    module.k.weight = nn.Parameter(torch.randn(16, 16))
    with torch.inference_mode():
        if on_change == "error":
            with pytest.raises(RecordingError, match="merged") as raised:
                compiled(x)
            assert raised.value.tensor == names[0]
        else:
            assert torch.allclose(compiled(x), module(x), atol=1e-5)
            with counters.expect(**{"replays:FULL": 1}):
                assert torch.allclose(compiled(x), module(x), atol=1e-5)


def test_an_output_that_is_kept_is_named_if_always_checked() -> None:
    compiled = recorded(Block(), {**EAGER, "cudagraph_check": "always"})
    slots = compiled.slots(4)
    with torch.inference_mode():
        kept = compiled(**slots)
        with pytest.raises(RecordingError, match="still held") as raised:
            compiled(**slots)
        assert raised.value.tensor == "output 0"
        del kept
        x = torch.randn(4, 16)
        assert torch.allclose(compiled(x), compiled.original(x), atol=1e-6)


class Cache(nn.Module):
    """Writes its rows into a cache and gives the cache's sum."""

    def forward(self, x: torch.Tensor, cache: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, slot, x)
        return cache.sum(0)


def test_memory_that_is_written_stays_the_caller_s_and_is_put_back_after_warm_up() -> None:
    cache, slot = torch.zeros(8, 16), torch.arange(3)
    compiled = recorded(Cache(), cache=cache, slot=slot, dynamic={"cache": None, "slot": {0: TOKENS}})
    assert not cache.any()
    with torch.inference_mode():
        x = torch.randn(4, 16)
        assert torch.allclose(compiled(x, cache, torch.arange(4)), x.sum(0), atol=1e-5)
        assert torch.equal(cache[:4], x)
        with pytest.raises(RecordingError, match="cache .input.") as raised:
            compiled(x, torch.zeros(8, 16), torch.arange(4))
        assert raised.value.tensor == "cache"


class Two(nn.Module):
    """Of two arguments whose sizes have nothing to do with each other."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum() + y


def test_several_dims_are_recorded_by_hand() -> None:
    shapes = {"x": {0: TOKENS}, "y": {0: Dim("num_rows", min=1, max=64)}}
    config = {"backend": "eager", "cudagraph_mode": "FULL"}
    compiled = onegraph.compile(Two(), dynamic_shapes=shapes, config=config)
    with torch.inference_mode():
        x, y = torch.randn(4, 16), torch.randn(3, 2)
        compiled.warm_up(x, y)
        assert sizes(compiled) == []
        assert torch.equal(compiled.record(x, y), x.sum() + y)
        with counters.expect(**{"replays:FULL": 1, "unrecorded_calls:size_not_recorded": 1}):
            other = torch.randn(4, 16)
            assert torch.equal(compiled(other, y), other.sum() + y)
            assert torch.equal(compiled(other, torch.zeros(5, 2)), other.sum() + torch.zeros(5, 2))


def test_lazy_recordings_are_made_at_the_first_call_of_a_size_and_leave_its_tensors_alone() -> None:
    compiled = recorded(Block(), {**EAGER, "cudagraph_lazy": True})
    assert sizes(compiled) == []
    with torch.inference_mode():
        first = torch.randn(4, 16)
        copy = first.clone()
        with counters.expect(**{"recordings:FULL": 1}):
            compiled(first)
        with counters.expect(**{"recordings:FULL": 0, "replays:FULL": 1}):
            x = torch.randn(4, 16)
            assert torch.allclose(compiled(x), compiled.original(x), atol=1e-6)
        assert torch.equal(first, copy)
        with counters.expect(**{"recordings:FULL": 0}):
            compiled(torch.randn(3, 16))
    assert sizes(compiled) == [(4, "FULL")]


def test_threads_get_their_own_results() -> None:
    compiled = recorded(Block())
    right: list[int] = []

    def call(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            for _ in range(50):
                x = torch.randn(4, 16, generator=generator)
                if torch.allclose(compiled(x), compiled.original(x), atol=1e-6):
                    right.append(seed)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 200


def test_a_piece_that_falls_back_is_no_longer_replayed() -> None:
    compiled = recorded(Block(), {**EAGER, "backend": "aot_eager"})
    compiled.fallback(0)
    assert sizes(compiled) == []
    with torch.inference_mode():
        x = torch.randn(4, 16)
        assert torch.allclose(compiled(x), compiled.original(x), atol=1e-6)


def test_the_plan_tells_sizes_memory_and_what_is_uncovered() -> None:
    compiled = recorded(Block())
    plan = compiled.explain().to_dict()["plan"]
    assert plan["mode"] == "FULL"
    assert [one["range"] for one in plan["uncovered"]] == [[2, 3], [5, 64]]
    assert {use["name"] for use in plan["memory"]} == {"norm.weight", "norm.bias", "linear.weight", "linear.bias"}
    assert all(one["steps"] > 0 and one["seconds"] > 0 and one["bytes"] > 0 for one in plan["sizes"])
    assert "recorded FULL at 1, 4" in str(compiled.explain())


def test_inputs_that_lie_otherwise_are_copied_with_their_strides() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 + 1

    config = {**EAGER, "backend": "inductor", "cudagraph_lazy": True}
    compiled = onegraph.compile(Scaled(), dynamic_shapes={"x": {0: TOKENS}}, config=config)
    with torch.inference_mode():
        for replays in (0, 1):
            x = torch.randn(4, 32)[:, :16]
            with counters.expect(**{"replays:FULL": replays, "recordings:FULL": 1 - replays}):
                assert torch.equal(compiled(x), x * 2 + 1)


def test_slots_that_are_passed_crosswise() -> None:
    class Difference(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x - 2 * y

    for mode in ("FULL", "PIECEWISE"):
        compiled = recorded(
            Difference(), {**EAGER, "cudagraph_mode": mode}, y=torch.randn(3, 16), dynamic={"y": {0: TOKENS}}
        )
        slots = compiled.slots(4)
        with torch.inference_mode():
            x, y = torch.randn(4, 16), torch.randn(4, 16)
            slots["x"].copy_(x), slots["y"].copy_(y)
            assert torch.equal(compiled(x=slots["y"], y=slots["x"]), y - 2 * x)
            slots["x"].copy_(x), slots["y"].copy_(y)
            assert torch.equal(compiled(x=y, y=slots["x"]), y - 2 * x)


def test_tensors_that_overlap_are_not_recorded() -> None:
    compiled = onegraph.compile(
        Table(), dynamic_shapes={"x": {0: TOKENS}, "table": {0: TOKENS}}, config={**EAGER, "cudagraph_lazy": True}
    )
    with torch.inference_mode():
        buffer = torch.randn(8, 16)
        with pytest.raises(RecordingError, match="x and table share memory"):
            compiled.record(buffer[:4], buffer[2:6])


def test_a_view_of_a_cache_is_the_cache_and_results_share_what_they_share() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
            cache[0] = x.sum(0)
            y = x + 1
            return cache[0], y, y.view(-1)

    cache = torch.zeros(2, 16)
    compiled = recorded(Views(), cache=cache, dynamic={"cache": None})
    with torch.inference_mode(), counters.expect(**{"replays:FULL": 2}):
        for _ in range(2):
            x = torch.randn(4, 16)
            row, y, flat = compiled(x, cache)
            assert torch.equal(y, x + 1) and flat.data_ptr() == y.data_ptr() and flat.shape == (64,)
            assert torch.equal(row, cache[0])
            row.zero_()
            assert not cache.any()


@pytest.mark.parametrize("config", [{"compile_sizes": [4]}, {"dynamic_shapes": "backed"}], ids=str)
def test_sizes_with_artifacts_and_traces_of_their_own(config: dict[str, Any]) -> None:
    module = Block()
    given = {**EAGER, "backend": "inductor", "cudagraph_capture_sizes": [1, 4, 16], **config}
    compiled = recorded(module, given)
    with torch.inference_mode(), counters.expect(**{"replays:FULL": 6}):
        for size in (16, 4, 1, 4, 16, 1):
            x = torch.randn(size, 16)
            assert torch.allclose(compiled(x), module(x), atol=1e-5)


def test_a_module_without_dynamic_dims() -> None:
    module = Block()
    compiled = onegraph.compile(module, config={"backend": "eager", "cudagraph_mode": "FULL"})
    with torch.inference_mode():
        compiled.warm_up(torch.randn(4, 16))
        with counters.expect(**{"replays:FULL": 3}):
            for _ in range(3):
                x = torch.randn(4, 16)
                assert torch.allclose(compiled(x), module(x), atol=1e-6)
    assert [one["num_tokens"] for one in compiled.explain().to_dict()["plan"]["sizes"]] == [None]


def test_a_forward_behind_a_decorator_and_hooks() -> None:
    def passes_on(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        return wrapper

    class Decorated(Block):
        forward = passes_on(Block.forward)  # type: ignore[assignment]

    module = Decorated()
    compiled = recorded(module)
    with torch.inference_mode(), counters.expect(**{"replays:FULL": 2}):
        for _ in range(2):
            x = torch.randn(4, 16)
            assert torch.allclose(compiled(x=x), module(x), atol=1e-6)


def test_a_piece_whose_sizes_follow_from_values_runs_as_ever() -> None:
    class Hits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x * 3).nonzero().float().sum(0)

    config = {**EAGER, "cudagraph_mode": "PIECEWISE", "splitting_ops": ["Tensor.nonzero"]}
    compiled = recorded(Hits(), config)
    unrecorded = compiled.explain().to_dict()["plan"]["sizes"][-1]["unrecorded"]
    assert any("follow from values" in one["why"] for one in unrecorded)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(4, 16)
            assert torch.equal(compiled(x), torch.relu(x * 3).nonzero().float().sum(0))


def test_what_a_piece_did_before_it_was_refused_is_undone() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sort(x + 1, 0).values
            self.calls.add_(1)
            return torch.rand_like(y) * 0 + y + self.calls

    module = Counted()
    config = {"backend": "eager", "cudagraph_mode": "PIECEWISE", "splitting_ops": ["torch.sort"]}
    compiled = onegraph.compile(module, dynamic_shapes={"x": {0: TOKENS}}, config=config)
    with torch.inference_mode():
        compiled.record(torch.randn(4, 16), recorded_as="PIECEWISE")
        assert module.calls == 1
        compiled(torch.randn(4, 16))
        assert module.calls == 2


def test_what_a_piece_writes_into_a_result_of_a_splitting_op_is_seen_after_it() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sort(x + 1, 0).values
            y.mul_(-1)
            return torch.sort(y, 0).values + 1

    module = Writes()
    compiled = recorded(module, {**EAGER, "cudagraph_mode": "PIECEWISE", "splitting_ops": ["torch.sort"]})
    with torch.inference_mode(), counters.expect(**{"replays:PIECEWISE": 3}):
        kept = []
        for _ in range(3):
            x = torch.randn(4, 16)
            kept.append(torch.empty(4, 16))  # so that the op's result comes at another address
            assert torch.equal(compiled(x), module(x))


def test_after_a_fallback_warm_up_records_again() -> None:
    compiled = recorded(Block(), {**EAGER, "backend": "aot_eager"})
    compiled.fallback(0)
    with torch.inference_mode():
        compiled.warm_up(torch.randn(3, 16))
        assert sizes(compiled) == [(1, "FULL"), (4, "FULL")]
        assert all(check.ok for check in compiled.check(torch.randn(3, 16), num_sizes=4))


def test_debug_finds_a_replay_that_gives_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Block()
    compiled = recorded(module, {**EAGER, "cudagraph_debug": True})
    x = torch.randn(4, 16)
    with torch.inference_mode():
        assert torch.allclose(compiled(x), module(x), atol=1e-6)
        monkeypatch.setattr(TapeRecording, "replay", lambda self: None)
        with pytest.raises(RecordingError, match="output 0 after a replay .FULL at 4.") as raised:
            compiled(torch.randn(4, 16))
    assert raised.value.tensor == "output 0"


def test_debug_finds_a_replay_that_writes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            cache.copy_(x.sum(0))
            return torch.zeros(1)

    cache = torch.zeros(16)
    compiled = recorded(Writes(), {**EAGER, "cudagraph_debug": True}, cache=cache, dynamic={"cache": None})
    monkeypatch.setattr(TapeRecording, "replay", lambda self: None)
    with torch.inference_mode(), pytest.raises(RecordingError, match="cache after a replay"):
        compiled(torch.randn(4, 16), cache)


def test_sizes_of_several_dims_are_refused() -> None:
    shapes = {"x": {0: TOKENS}, "y": {0: Dim("num_rows", min=1, max=64)}}
    compiled = onegraph.compile(Two(), dynamic_shapes=shapes, config=EAGER)
    with torch.inference_mode(), pytest.raises(ConfigError, match="one dynamic dim, and there are 2"):
        compiled.warm_up(torch.randn(4, 16), torch.randn(4, 16))


def test_inference_mode_and_no_grad_are_recorded_apart() -> None:
    compiled = recorded(Block())
    with torch.no_grad(), counters.expect(**{"replays:FULL": 0, "unrecorded_calls:other_inference_mode": 1}):
        compiled(torch.randn(4, 16))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"cudagraph_mode": "FULL", "mode": 0}, "captures no graph"),
        ({"cudagraph_mode": "NONE", "cudagraph_capture_sizes": [1]}, "nothing is recorded"),
        ({"cudagraph_mode": "NONE", "on_memory_change": "rerecord"}, "nothing is recorded"),
    ],
)
def test_settings_that_contradict_each_other(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        onegraph.compile(Block(), config=config)


def test_a_size_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="cudagraph_capture_sizes has 65"):
        recorded(Block(), {**EAGER, "cudagraph_capture_sizes": [65]})


def test_what_a_splitting_op_alone_reads_may_be_another_tensor_in_each_call() -> None:
    """A cache that is passed anew: the pieces around the op have nothing to do with it."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            rows = torch.index_select(cache, 0, (self.first(x)[:, 0] > 0).long())
            return self.second(x + rows)

    config = {**EAGER, "cudagraph_mode": "PIECEWISE", "splitting_ops": ["torch.index_select"]}
    module = Cached()

    compiled = recorded(module, config, cache=torch.randn(2, 16))
    with torch.inference_mode():
        for _ in range(3):
            x, other = torch.randn(4, 16), torch.randn(2, 16)
            with counters.expect(**{"replays:PIECEWISE": 1, "recordings_with_moved_memory": 0}):
                found = compiled(x, other)
            assert torch.allclose(found, module(x, other), atol=1e-5)


def test_below_torch_compile_the_first_call_of_a_graph_is_recorded() -> None:
    torch._dynamo.reset()
    module, options = Block(), {"backend": "eager", "cudagraph_mode": "FULL"}
    compiled = torch.compile(module, backend="onegraph", dynamic=False, options=options)
    with torch.inference_mode(), counters.expect(**{"recordings:FULL": 2, "replays:FULL": 4}):
        for size in (4, 2, 4, 2, 4, 2):
            x = torch.randn(size, 16)
            found = compiled(x)
            assert torch.allclose(found, module(x), atol=1e-6)
    module.linear.weight.data = torch.randn(16, 16)  # Dynamo has no guard on where a weight lies
    with torch.inference_mode(), pytest.raises(RecordingError, match="isn't the memory that was recorded") as raised:
        compiled(torch.randn(4, 16))
    assert raised.value.tensor is not None and "weight" in raised.value.tensor


def test_below_torch_compile_sizes_are_dynamo_s() -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": "eager", "cudagraph_mode": "FULL"}
    for more, dynamic, told in (
        ({}, True, "torch.compile has made a graph of several"),
        ({"cudagraph_capture_sizes": [4]}, False, "can't be honoured below Dynamo"),
        ({"cudagraph_padding": {"x": "zero"}}, False, "can't be honoured below Dynamo"),
    ):
        compiled = torch.compile(Block(), backend="onegraph", dynamic=dynamic, options={**options, **more})
        with torch.inference_mode(), pytest.raises(Exception, match=told):
            compiled(torch.randn(4, 16))
