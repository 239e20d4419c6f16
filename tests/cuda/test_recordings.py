"""Recordings as CUDA graphs, on a GPU; where there is none the recorder runs on CUDA graphs that are faked.

What is tested of compiled models everywhere (`tests/pipeline/test_recordings.py`) is tested here of the other recorder,
with what only that does: warm-up, capture, its pool, its errors.
"""

from __future__ import annotations

import gc
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.counters import counters
from onegraph.errors import CaptureError, RecordingError
from onegraph.ir.recording import NotRecordableError
from onegraph.targets.cuda import graphs
from tests.cuda.conftest import Device
from tests.cuda.fake_graphs import Capture, CaptureOf211, FakeCuda, FakeGraph, FakeStream

TOKENS = Dim("num_tokens", min=1, max=64)
FULL = {"backend": "eager", "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 4]}
"""Pieces that run op by op: the recorder is the same for all backends."""
BACKENDS = ["eager", "aot_eager", "inductor"]


class Block(nn.Module):
    """A normalised layer with a residual, as most are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.silu(self.linear(self.norm(x)))


class Split(nn.Module):
    """Two pieces, and a sort between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.sort(self.first(x), 0).values)


PIECES = {**FULL, "cudagraph_mode": "PIECEWISE", "splitting_ops": ["torch.sort"]}


def rows(device: Device, size: int = 4) -> torch.Tensor:
    return torch.randn(size, 16, device=device.name)


def recorded(device: Device, module: nn.Module, config: Any = FULL, **others: Any) -> Any:
    compiled = onegraph.compile(
        module.to(device.name), dynamic_shapes={"x": {0: TOKENS}, **others.pop("dynamic", {})}, config=config
    )
    with torch.inference_mode():
        compiled.warm_up({"x": rows(device, 3), **others})
    return compiled


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-5)


def refused(run: Callable[[], Any], device: Device, *inputs: torch.Tensor) -> NotRecordableError:
    with pytest.raises(NotRecordableError) as caught:
        device.recorder().record(run, inputs)
    return caught.value


# What the fake stands for.


def test_the_fake_has_the_names_that_torch_has(device: Device) -> None:
    if device.fake is None:
        pytest.skip("the fake isn't used")
    used = [name for name in vars(FakeCuda) if not name.startswith(("_", "host_kernels", "run_on_host"))]
    assert all(hasattr(torch.cuda, name) for name in used), used
    assert hasattr(torch.cuda.Stream, "wait_stream") and vars(FakeStream).keys() >= {"wait_stream"}
    for fake, real in ((Capture.__init__, torch.cuda.graph.__init__), (CaptureOf211.__init__, torch.cuda.graph)):
        assert inspect.signature(fake).parameters.keys() - {"self"} <= inspect.signature(real).parameters.keys()
    for name in ("capture_begin", "capture_end", "replay", "pool"):
        theirs = inspect.signature(getattr(torch.cuda.CUDAGraph, name)).parameters
        assert inspect.signature(getattr(FakeGraph, name)).parameters.keys() == theirs.keys()
    assert next(iter(inspect.signature(torch.cuda.memory_snapshot).parameters)) == "mempool_id"


# How a recording is made.


def test_a_call_is_run_once_then_captured_on_a_stream_of_its_own(device: Device) -> None:
    x, out = rows(device), torch.zeros(4, 16, device=device.name)
    calls = 0

    def run() -> torch.Tensor:
        nonlocal calls
        calls += 1
        out.add_(x)
        return x * 2

    recording, result = device.recorder().record(run, [x, out])
    assert calls == 2  # once for what only a first call does, and once captured
    assert torch.equal(out, x) and torch.equal(result, x * 2)  # and done once
    assert len(device.cuda.captures) == 1
    x.fill_(3)
    recording.replay()
    assert torch.equal(result, torch.full_like(x, 6)) and calls == 2
    if device.fake is not None:
        assert device.fake.log == [
            *("wait_stream", "wait_stream"),  # for the call's memory, and for the first run
            *("synchronize", "capture_begin", "capture_end", "replay"),
        ]


def test_all_graphs_share_a_pool_and_garbage_is_collected_after_the_capture(device: Device) -> None:
    compiled = recorded(device, Split(), {**PIECES, "cudagraph_mode": "PIECEWISE"})
    captures = device.cuda.captures
    assert len(captures) == 4  # two pieces of two sizes
    assert len({one["pool"] for one in captures}) == len({id(one["capture_stream"]) for one in captures}) == 1
    assert {one["capture_error_mode"] for one in captures} == {"thread_local"}
    assert not any(one["gc"] for one in captures) and gc.isenabled()
    other = recorded(device, Block())
    assert {one["pool"] for one in captures[4:]}.isdisjoint({one["pool"] for one in captures[:4]})
    with torch.inference_mode():
        x = rows(device)
        assert same(compiled(x), compiled.original(x)) and same(other(x), other.original(x))


def test_the_largest_size_is_recorded_first_and_smaller_ones_take_no_more_memory(device: Device) -> None:
    compiled = recorded(device, Block(), {**FULL, "cudagraph_capture_sizes": [1, 64, 4]})
    assert [one[-1][0] for one in device.recorded] == [64, 4, 1]
    sizes = {one["num_tokens"]: one["bytes"] for one in compiled.explain().to_dict()["plan"]["sizes"]}
    assert sizes[64] > 0 and sizes[1] == sizes[4] == 0
    assert all(one["steps"] == 1 for one in compiled.explain().to_dict()["plan"]["sizes"])


def test_another_thread_may_wait_for_the_device_meanwhile(device: Device) -> None:
    x = rows(device)

    def run() -> torch.Tensor:
        thread = threading.Thread(target=device.cuda.synchronize)
        thread.start()
        thread.join()
        return x + 1

    recording, result = device.recorder().record(run, [x])
    x.fill_(1)
    recording.replay()
    assert torch.equal(result, torch.full_like(x, 2))


def test_a_wait_for_the_device_is_refused_and_the_next_recording_is_made(device: Device) -> None:
    x, recorder = rows(device), device.recorder()

    def run() -> torch.Tensor:
        y = x + 1
        device.cuda.synchronize()
        return y

    with pytest.raises(NotRecordableError, match="a CUDA graph can't hold it: CUDA error: operation not") as caught:
        recorder.record(run, [x])
    assert caught.value.code == "not_capturable" and gc.isenabled()
    recording, result = recorder.record(lambda: x * 2, [x])
    x.fill_(1)
    recording.replay()
    assert torch.equal(result, torch.full_like(x, 2))


def test_what_the_code_itself_raises_is_raised(device: Device) -> None:
    x, recorder = rows(device), device.recorder()
    calls = 0

    def run() -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise KeyError("at the first run, and in the capture")
        return x + 1

    for _ in range(2):
        with pytest.raises(KeyError, match="in the capture"):
            recorder.record(run, [x])
    recording, result = recorder.record(run, [x])
    recording.replay()
    assert torch.equal(result, x + 1)


@pytest.mark.parametrize("version", ["2.11", "2.13"])
def test_torch_looks_whether_memory_is_there_where_its_version_can(version: str, device: Device) -> None:
    if device.fake is None:
        if (version == "2.13") != (graphs.LIVENESS in inspect.signature(torch.cuda.graph).parameters):
            pytest.skip("this torch is another version")
    elif version == "2.11":
        device.fake.graph = device.cuda.graph = CaptureOf211
    x, tables = rows(device), [rows(device)]
    recording, result = device.recorder(checks_liveness=True).record(lambda: x + tables[0], [x, *tables])
    recording.replay()
    assert torch.equal(result, x + tables[0])
    tables.clear()
    gc.collect()
    if version == "2.11":
        return  # a replay would read memory that is free
    with pytest.raises(RecordingError, match="memory that the recording reads was freed"):
        recording.replay()


def test_liveness_is_asked_for_with_check_always(device: Device) -> None:
    recorded(device, Block())
    recorded(device, Block(), {**FULL, "cudagraph_check": "always"})
    asked = [one.get(graphs.LIVENESS, False) for one in device.cuda.captures]
    has = graphs.LIVENESS in inspect.signature(device.cuda.graph).parameters
    assert asked == [False, False, has, has]


def test_memory_that_nobody_passes_is_kept(device: Device) -> None:
    x, tables = rows(device), [rows(device)]
    recording, result = device.recorder().record(lambda: x + tables[0], [x])
    expected = x + tables[0]
    assert len(recording._held[1]) == 1
    tables.clear()
    gc.collect()
    others = [torch.full((4, 16), float("nan"), device=device.name) for _ in range(8)]
    recording.replay()
    assert torch.equal(result, expected) and len(others) == 8


# What is refused.


def test_reads_of_values_and_sizes_that_follow_from_them_are_refused(device: Device) -> None:
    x = rows(device)
    assert refused(lambda: x * x.sum().item(), device, x).code == "host_read"
    assert refused(lambda: x.tolist(), device, x).code == "host_read"
    assert refused(lambda: x.nonzero(), device, x).code == "data_dependent_shape"
    assert device.cuda.captures == []


def test_a_branch_on_a_value_is_refused_at_capture_and_a_host_op_is_named_with_its_line(device: Device) -> None:
    calls = 0

    @torch.library.custom_op("cuda_recordings_test::counted", mutates_args=())
    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x * 2

    @counted.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.cuda_recordings_test.counted(x + 1) - 1

    with pytest.raises(CaptureError, match="data-dependent|item"):
        recorded(device, Branching())
    with pytest.raises(RecordingError, match="cuda_recordings_test.counted.*Python") as caught:
        recorded(device, Counting())
    assert caught.value.where is not None and "test_recordings.py" in caught.value.where
    config = {**PIECES, "splitting_ops": ["cuda_recordings_test::counted"]}
    compiled = recorded(device, Counting(), config)
    with torch.inference_mode():
        before, x = calls, rows(device)
        for _ in range(3):
            assert torch.equal(compiled(x), (x + 1) * 2 - 1)
    assert calls == before + 3


def test_an_op_that_is_tagged_unsafe_is_named(device: Device) -> None:
    library = torch.library.Library("cuda_recordings_tags", "FRAGMENT")
    library.define("unsafe(Tensor x) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
    library.impl("unsafe", lambda x: x * 2, "CompositeExplicitAutograd")
    library.impl("unsafe", lambda x: torch.empty_like(x), "Meta")

    class Unsafe(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.cuda_recordings_tags.unsafe(x)

    with pytest.raises(RecordingError, match="cuda_recordings_tags.unsafe.* is tagged"):
        recorded(device, Unsafe())


def test_tensors_of_the_host_are_refused(device: Device) -> None:
    """Their values would be those of the recording; constants of the code itself are."""
    x, host = rows(device), torch.ones(4, 16, device="meta" if device.fake else "cpu")
    scale = torch.ones((), device=host.device)
    for run in (lambda: x + scale, lambda: host + 1, lambda: host.to(x.device)):
        error = refused(run, device, x)
        assert error.code == "host_code" and "host" in error.why
    assert refused(lambda: torch.arange(4, device=host.device), device, x).code == "host_code"
    recording, result = device.recorder().record(lambda: x * torch.tensor(2.0), [x])
    x.fill_(3)
    recording.replay()
    assert torch.equal(result, torch.full_like(x, 6))


def test_compiled_kernels_that_run_on_the_host_are_refused(device: Device) -> None:
    if device.fake is None:

        class Mixed(nn.Module):
            def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return x + 1, y.sin() + y.cos()

        config = {**FULL, "backend": "inductor"}
        with pytest.raises(RecordingError, match="host"):
            recorded(device, Mixed(), config, y=torch.randn(3, 16), dynamic={"y": {0: TOKENS}})
        return
    x = rows(device)
    error = refused(lambda: (device.fake.run_on_host("cpp_fused_sin"), x + 1), device, x)
    assert (error.code, error.op) == ("host_code", "cpp_fused_sin")


# Replays.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["FULL", "PIECEWISE"])
def test_a_replay_equals_the_plain_call(mode: str, backend: str, device: Device) -> None:
    module = Split()
    compiled = recorded(device, module, {**PIECES, "cudagraph_mode": mode, "backend": backend})
    plain = onegraph.compile(module, dynamic_shapes={"x": {0: TOKENS}}, config={"backend": backend})
    with torch.inference_mode():
        for size in (4, 1, 4, 1):
            x = rows(device, size)
            with counters.expect(**{f"replays:{mode}": 1}):
                found = compiled(x)
            assert same(found, plain(x))
        with counters.expect(**{f"replays:{mode}": 0, "unrecorded_calls:size_not_recorded": 1}):
            x = rows(device, 5)
            assert same(compiled(x), plain(x))


def test_slots_are_replayed_in_place(device: Device) -> None:
    compiled = recorded(device, Block())
    slots = compiled.slots(4)
    with torch.inference_mode():
        slots["x"].copy_(rows(device))
        first = compiled(**slots)
        address, copy = first.data_ptr(), first.clone()
        slots["x"].copy_(rows(device))
        second = compiled(**slots)
        assert second.data_ptr() == address and not torch.equal(copy, second)
        assert same(second, compiled.original(slots["x"]))


def test_random_numbers_are_others_in_each_replay(device: Device) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0 + torch.rand_like(x)

    compiled = recorded(device, Noisy())
    with torch.inference_mode(), counters.expect(**{"replays:FULL": 3}):
        drawn = [compiled(rows(device)) for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert all(bool(((one >= 0) & (one < 1)).all()) for one in drawn)


class Cache(nn.Module):
    """Writes its rows into a cache and gives the cache's sum."""

    def forward(self, x: torch.Tensor, cache: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(0, slot, x)
        return cache.sum(0)


def test_a_cache_is_written_where_it_lies_and_put_back_after_warm_up(device: Device) -> None:
    cache, slot = torch.zeros(8, 16, device=device.name), torch.arange(3, device=device.name)
    compiled = recorded(device, Cache(), cache=cache, slot=slot, dynamic={"cache": None, "slot": {0: TOKENS}})
    assert not cache.any()
    with torch.inference_mode():
        x, slot = rows(device), torch.arange(4, device=device.name)
        assert torch.allclose(compiled(x, cache, slot), x.sum(0), atol=1e-5)
        assert torch.equal(cache[:4], x)
        with pytest.raises(RecordingError, match="cache .input.") as raised:
            compiled(x, torch.zeros_like(cache), slot)
        assert raised.value.tensor == "cache"


# The manifest.


class Table(nn.Module):
    """Adds a table that the caller passes."""

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x + table


def test_a_new_input_tensor_is_named(device: Device) -> None:
    table = torch.randn(16, device=device.name)
    compiled = recorded(device, Table(), table=table)
    with torch.inference_mode():
        x = rows(device)
        table += 1  # the same memory
        assert torch.equal(compiled(x, table), x + table)
        with pytest.raises(RecordingError, match="table .input.*recorded at") as raised:
            compiled(x, torch.randn_like(table))
        assert raised.value.tensor == "table" and "was freed" not in raised.value.message


def test_a_freed_tensor_is_named_as_freed(device: Device) -> None:
    table = torch.randn(16, device=device.name)
    compiled = recorded(device, Table(), {**FULL, "backend": "inductor"}, table=table)
    other = torch.randn_like(table)
    del table
    gc.collect()
    with torch.inference_mode(), pytest.raises(RecordingError, match="was freed"):
        compiled(rows(device), other)


def replace(module: nn.Module) -> None:
    module.linear.weight = nn.Parameter(torch.randn_like(module.linear.weight))


def point_elsewhere(module: nn.Module) -> None:
    module.linear.weight.data = torch.randn_like(module.linear.weight)


def fill(module: nn.Module) -> None:
    module.linear.weight.copy_(torch.randn_like(module.linear.weight))


def test_weights_that_are_changed_in_place_are_seen(device: Device) -> None:
    compiled = recorded(device, Block())
    fill(compiled.original)
    with torch.inference_mode(), counters.expect(**{"replays:FULL": 1}):
        x = rows(device)
        assert same(compiled(x), compiled.original(x))


@pytest.mark.parametrize("change", [replace, point_elsewhere])
def test_a_weight_that_lies_elsewhere_is_named_or_recorded_again(
    change: Callable[[nn.Module], None], device: Device
) -> None:
    module = Block()
    compiled = recorded(device, module)
    again = recorded(device, module, {**FULL, "on_memory_change": "rerecord"})
    kept = module.linear.weight.detach()  # so that the new memory isn't the old one
    change(module)
    with torch.inference_mode():
        x = rows(device)
        with pytest.raises(RecordingError, match="linear.weight .weight.") as raised:
            compiled(x)
        assert raised.value.tensor == "linear.weight" and kept is not None
        with counters.expect(**{"recordings:FULL": 1, "replays:FULL": 0}):
            assert same(again(x), module(x))
        with counters.expect(**{"recordings:FULL": 0, "replays:FULL": 1}):
            assert same(again(x), module(x))


def test_an_output_that_is_kept_is_named_if_always_checked(device: Device) -> None:
    compiled = recorded(device, Block(), {**FULL, "cudagraph_check": "always"})
    slots = compiled.slots(4)
    with torch.inference_mode():
        kept = compiled(**slots)
        with pytest.raises(RecordingError, match="still held") as raised:
            compiled(**slots)
        assert raised.value.tensor == "output 0"
        del kept
        x = rows(device)
        assert same(compiled(x), compiled.original(x))


def test_what_a_replay_left_behind_is_poisoned_and_what_somebody_holds_is_not(device: Device) -> None:
    x = rows(device)
    middle: list[torch.Tensor] = []

    def run() -> torch.Tensor:
        y = x + 1
        middle[:] = [y.detach()]
        return y * 2

    recorder = device.recorder()
    recording, result = recorder.record(run, [x])
    recording.replay()
    expected = result.clone()
    assert torch.equal(middle[0], x + 1)
    address, shape = middle[0].data_ptr(), middle[0].shape
    middle.clear()
    gc.collect()
    recording.poison()
    left = graphs.tensor_at(address, shape, result)
    assert left.isnan().all() and torch.equal(result, expected)
    recording.replay()
    assert torch.equal(result, expected)


def test_poisoned_memory_reaches_no_result_of_a_model(device: Device) -> None:
    for config in (FULL, PIECES):
        compiled = recorded(device, Split(), {**config, "cudagraph_check": "always"})
        with torch.inference_mode():
            for size in (4, 1, 4):
                x = rows(device, size)
                assert same(compiled(x), compiled.original(x))


def test_debug_compares_each_replay_to_the_bit(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = recorded(device, Block(), {**FULL, "cudagraph_debug": True})
    with torch.inference_mode():
        x = rows(device)
        assert same(compiled(x), compiled.original(x))
        monkeypatch.setattr(graphs.CudaGraphRecording, "replay", lambda self: None)
        with pytest.raises(RecordingError, match="output 0 after a replay .FULL at 4."):
            compiled(rows(device))
