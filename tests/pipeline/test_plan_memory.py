"""Memory that is reused from call to call: a call allocates next to nothing, and nobody sees another call's values."""

import dataclasses
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from tests.pipeline.test_kv_cache import attention_layers
from tests.pipeline.test_kv_cache import inputs as attention_inputs

ROWS = {"x": {0: Dim("rows", min=1, max=64)}}
AT_RELU = {"splitting_ops": ["torch.relu"]}
WIDTH = 64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x).sin())) * 2


class Tower(nn.Module):
    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(num_layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.softmax(-1)


def compiled(function: Any, **config: Any) -> Any:
    return onegraph.compile(function, dynamic_shapes=ROWS, config={**AT_RELU, **config})


def allocations(call: Any) -> list[int]:
    """The sizes in bytes of what a call allocates, as torch's profiler sees it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    del kept
    return sorted(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("splitting_ops", [[], ["torch.relu"]])
def test_a_call_allocates_its_results_and_what_foreign_ops_give_and_get(splitting_ops: list[str]) -> None:
    tower, x = Tower(3).eval(), torch.randn(5, WIDTH)
    model = compiled(tower, splitting_ops=splitting_ops)
    for _ in range(2):
        torch.testing.assert_close(model(x), tower(x))
    ops = 3 * bool(splitting_ops)
    assert allocations(lambda: model(x)) == [x.nbytes] * (2 * ops + 1)
    unplanned = compiled(tower, splitting_ops=splitting_ops, plan_memory=False)
    torch.testing.assert_close(unplanned(x), tower(x))
    assert len(allocations(lambda: unplanned(x))) > 2 * ops + 3
    assert "__memory" not in unplanned.explain().plan_source and unplanned.explain().buffers is None


@pytest.mark.usefixtures("no_grad", "op_kernels")
def test_attention_writes_into_planned_memory() -> None:
    shapes = dict.fromkeys(attention_inputs(1)) | {"x": {0: Dim("rows", min=1, max=16)}}
    shapes |= {"slot_mapping": shapes["x"], "kv_caches": [(None, None)] * 3}
    model = onegraph.compile(
        attention_layers,
        dynamic_shapes=shapes,
        config={"splitting_ops": ["onegraph::write_kv_cache", "onegraph::paged_attention"]},
    )
    for size in (7, 1, 16, 7, 1):
        found, expected = attention_inputs(size), attention_inputs(size)
        torch.testing.assert_close(model(**found), attention_layers(**expected))
        torch.testing.assert_close(found["kv_caches"], expected["kv_caches"])
    buffers = model.explain().buffers
    assert [one.names for one in buffers.buffers if "contiguous" in one.layout] == [("out",), ("out_1",), ("out_2",)]
    assert buffers.sizes == {"u0": 16} and buffers.num_bytes < buffers.num_bytes_apart
    # under a profiler the ops go through the dispatcher, and so allocate
    given = attention_inputs(7)
    assert allocations(lambda: model(**given)) == [given["x"].nbytes] * (3 + 1)


@pytest.mark.usefixtures("no_grad")
def test_results_keep_their_values() -> None:
    def function(x: torch.Tensor) -> Any:
        y = x @ x.t() @ x
        z = torch.relu(y + 1)
        return y, z * 2, y[:, 1:3], (z @ x.t()).sum(1)

    model = compiled(function)
    given = [torch.randn(rows, WIDTH) for rows in (5, 5, 64, 1, 5)]
    found = [model(x) for x in given]
    for x, results in zip(given, found, strict=True):
        torch.testing.assert_close(results, function(x), rtol=1e-4, atol=1e-4)
    assert found[0][2].data_ptr() - found[0][0].data_ptr() == 4


@pytest.mark.usefixtures("no_grad")
def test_below_torch_compile_a_call_allocates_its_results() -> None:
    torch._dynamo.reset()
    tower = Tower(3).eval()
    model = torch.compile(tower, backend="onegraph")
    given = [torch.randn(rows, WIDTH) for rows in (5, 7, 5, 7)]
    found = [model(x) for x in given]
    for x, result in zip(given, found, strict=True):
        torch.testing.assert_close(result, tower(x))
    assert allocations(lambda: model(given[0])) == [given[0].nbytes]


def test_results_are_plain_tensors_whoever_called_first() -> None:
    tower = Tower(2).eval()
    model = compiled(tower)
    x = torch.randn(3, WIDTH)
    with torch.inference_mode():
        assert model(x).is_inference()
    with torch.no_grad():
        result = model(x)
    assert not result.is_inference()
    result += 1  # an inference tensor would refuse
    torch.testing.assert_close(result, tower(x) + 1)


KEPT: list[torch.Tensor] = []


@torch.library.custom_op("onegraph_tests::keeps", mutates_args=())
def keeps(x: torch.Tensor) -> torch.Tensor:
    """An op that keeps what it is given."""
    KEPT.append(x)
    return x + 1


@keeps.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("splitting_ops", [[], ["onegraph_tests::keeps"]])
def test_an_op_may_keep_what_it_is_given(splitting_ops: list[str]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).sin()
        return (keeps(y) + y).cos() @ x.t()

    model = compiled(function, splitting_ops=splitting_ops)
    for _ in range(3):
        model(torch.zeros(4, WIDTH))
    KEPT.clear()
    given = [torch.randn(4, WIDTH) for _ in range(3)]
    for x in given:
        model(x)
    torch.testing.assert_close(KEPT, [(x * 2).sin() for x in given])


REENTERED: list[Any] = []


@torch.library.custom_op("onegraph_tests::calls_the_model", mutates_args=())
def calls_the_model(x: torch.Tensor) -> torch.Tensor:
    """An op that calls a model, or raises, in the middle of the model's call."""
    action = REENTERED.pop() if REENTERED else None
    if action is not None:
        action()
    return x.clone()


@calls_the_model.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.usefixtures("no_grad")
def test_calls_inside_of_a_call_and_calls_that_raise() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = (x @ x.t()).sin()
        return calls_the_model(x * 2) + (y @ x).relu() + y.sum()

    model = compiled(function, splitting_ops=["onegraph_tests::calls_the_model"])
    x, other, inner = torch.randn(6, WIDTH), torch.randn(6, WIDTH), []
    model(x)
    for _ in range(3):
        inner.clear()
        REENTERED.append(lambda: inner.append(model(other)))
        torch.testing.assert_close([model(x), *inner], [function(x), function(other)])

    def refuse() -> None:
        raise ValueError("not now")

    REENTERED.append(refuse)
    with pytest.raises(ValueError, match="not now"):
        model(x)
    torch.testing.assert_close(model(x), function(x))


def test_threads_call_at_the_same_time() -> None:
    tower = Tower(4).eval()
    model = compiled(tower)
    wrong: list[int] = []

    def run(number: int) -> None:
        x = torch.randn(number + 1, WIDTH)
        with torch.inference_mode():
            expected = tower(x)
            wrong.extend(number for _ in range(200) if not torch.allclose(model(x), expected, atol=1e-5))

    with torch.inference_mode():
        model(torch.randn(2, WIDTH))
    threads = [threading.Thread(target=run, args=(number % 3,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("no_grad")
def test_a_piece_that_falls_back_gets_memory_of_its_own() -> None:
    tower, x = Tower(3).eval(), torch.randn(5, WIDTH)
    model = compiled(tower)
    model(x)
    before = model.explain().buffers
    model.fallback(piece=2)
    torch.testing.assert_close(model(x), tower(x))
    after = model.explain().buffers
    assert len(after.buffers) < len(before.buffers)
    model.fallback(piece=0)
    model.fallback(piece=6)
    model.fallback(piece=4)
    torch.testing.assert_close(model(x), tower(x))
    assert model.explain().buffers is None


TURNED: list[bool] = [False]


@torch.library.custom_op("onegraph_tests::turns", mutates_args=())
def turns(x: torch.Tensor) -> torch.Tensor:
    """An op whose result is laid out otherwise than its fake says, but not in the call that is checked."""
    return (x + 1).t().contiguous().t() if TURNED[0] else x + 1


@turns.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.usefixtures("no_grad")
def test_what_an_op_gives_is_checked_in_every_call() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return turns(x * 2).sin()

    model = compiled(function, splitting_ops=["onegraph_tests::turns"])
    x = torch.randn(4, WIDTH)
    model(x)
    TURNED[0] = True
    try:
        with pytest.raises(AssertionError, match="stride"):
            model(x)
    finally:
        TURNED[0] = False
    torch.testing.assert_close(model(x), function(x))


@pytest.mark.usefixtures("no_grad")
def test_sizes_share_one_block_and_old_ones_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onegraph.plan.memory.KEPT_SIZES", 3)
    tower = Tower(2).eval()
    model = compiled(tower)
    for rows in (1, 2, 64, 3, 4, 5, 64, 1, 2, 3, 4):
        x = torch.randn(rows, WIDTH)
        torch.testing.assert_close(model(x), tower(x))
    from onegraph.plan.memory import Block

    blocks = [one for one in gc.get_objects() if type(one) is Block and len(one._plan.calls) == 5]
    assert max(len(block._bound) for block in blocks) == 3


@pytest.mark.usefixtures("no_grad")
def test_sizes_and_ranges_of_their_own_share_the_block() -> None:
    tower = Tower(2).eval()
    model = compiled(tower, compile_sizes=[4], compile_ranges=[8])
    for rows in (4, 5, 9, 4, 64, 8):
        x = torch.randn(rows, WIDTH)
        torch.testing.assert_close(model(x), tower(x))
    assert "__pieces = __block.pieces(__region_of(" in model.explain().plan_source


@pytest.mark.usefixtures("no_grad")
def test_the_plan_shows_what_lies_where() -> None:
    model = compiled(Tower(3).eval())
    model(torch.randn(5, WIDTH))
    explanation = model.explain()
    buffers = explanation.buffers
    assert f"memory of one call at u0 = 64: {buffers.num_bytes:,} bytes" in explanation.plan_text
    assert "(u0, 64), (64, 1), float32" in explanation.plan_text
    live = [one for one in buffers.buffers if not one.names[0].startswith("buf")]
    for one in live:
        for other in live:
            together = one is not other and one.first <= other.last and other.first <= one.last
            apart = one.offset + one.num_bytes <= other.offset or other.offset + other.num_bytes <= one.offset
            assert apart or not together, (one, other)
    assert dataclasses.asdict(buffers)["sizes"] == {"u0": 64}


def test_a_default_device_of_the_caller_is_not_where_values_lie(fresh_cache: Any) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(torch.relu(x @ x.t()) + 1) @ x

    compiled = onegraph.compile(model, dynamic_shapes={"x": {0: Dim("n", min=2, max=64)}})
    x = torch.randn(5, 4)
    with torch.no_grad(), torch.device("meta"):
        for _ in range(4):
            torch.testing.assert_close(compiled(x), model(x))
