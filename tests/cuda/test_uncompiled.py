"""`mode=0` with `cudagraph_mode=FULL`: an uncompiled module, recorded whole, and at its eager breaks in parts."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.counters import counters
from onegraph.errors import ConfigError, RecordingError
from tests.cuda.conftest import Device

TOKENS = Dim("num_tokens", min=1, max=64)
CONFIG = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 4]}


def rows(device: Device, size: int = 4) -> torch.Tensor:
    return torch.randn(size, 16, device=device.name)


def recorded(device: Device, module: Any, config: Any = CONFIG, **others: Any) -> Any:
    if isinstance(module, nn.Module):
        module.to(device.name)
    compiled = onegraph.compile(module, dynamic_shapes={"x": {0: TOKENS}, **others.pop("dynamic", {})}, config=config)
    with torch.inference_mode():
        compiled.warm_up({"x": rows(device, 3), **others})
    return compiled


class Layer(nn.Module):
    """A layer that counts its calls in a buffer and writes a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))
        self.scale = 2.0

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> dict[str, Any]:
        out = torch.relu(self.linear(x)) * self.scale
        self.calls.add_(1)
        if cache is not None:
            cache.copy_(out.sum(0))
        return {"out": out, "rest": [out + 1, None]}


def test_results_structure_and_effects_are_the_modules_own(device: Device) -> None:
    module, cache = Layer(), torch.zeros(16, device=device.name)
    compiled = recorded(device, module, cache=cache, dynamic={"cache": None})
    assert not module.calls and not cache.any()  # what warm_up changed is put back
    assert len(device.cuda.captures) == 2
    with torch.inference_mode():
        for number, size in enumerate((4, 1, 4), 1):
            x = rows(device, size)
            with counters.expect(**{"replays:FULL": 1, "dynamo_compiles": 0}):
                found = compiled(x, cache=cache)
            expected = torch.relu(module.linear(x)) * 2
            assert torch.equal(found["out"], expected) and torch.equal(found["rest"][0], expected + 1)
            assert list(found) == ["out", "rest"] and found["rest"][1] is None
            assert torch.allclose(cache, expected.sum(0)) and int(module.calls) == number
        with counters.expect(**{"replays:FULL": 0, "unrecorded_calls:size_not_recorded": 1}):
            assert compiled(rows(device, 5), cache)["out"].shape == (5, 16)
        with counters.expect(**{"unrecorded_calls:other_arguments": 1}):
            assert compiled(rows(device, 4))["out"].shape == (4, 16)
    plan = compiled.explain().to_dict()["plan"]
    assert {use["name"] for use in plan["memory"]} == {"linear.weight", "linear.bias", "calls", "cache"}
    assert [(one["num_tokens"], one["mode"]) for one in plan["sizes"]] == [(1, "FULL"), (4, "FULL")]


def test_slots_are_replayed_in_place_and_moved_memory_is_named(device: Device) -> None:
    module = Layer()
    compiled = recorded(device, module)
    again = recorded(device, module, {**CONFIG, "on_memory_change": "rerecord"})
    slots = compiled.slots(4)
    with torch.inference_mode():
        slots["x"].copy_(rows(device))
        first = compiled(**slots)["out"]
        address = first.data_ptr()
        assert compiled(**slots)["out"].data_ptr() == address
        kept = module.linear.weight
        module.linear.weight = nn.Parameter(torch.randn_like(kept))
        with pytest.raises(RecordingError, match="linear.weight .weight.") as caught:
            compiled(**slots)
        assert caught.value.tensor == "linear.weight"
        x = rows(device)
        with counters.expect(**{"recordings:FULL": 1}):
            again(x)
        with counters.expect(**{"replays:FULL": 1}):
            assert torch.equal(again(x)["out"], torch.relu(module.linear(x)) * 2)


def test_changed_python_values_are_seen(device: Device) -> None:
    module = Layer()
    compiled = recorded(device, module)
    with torch.inference_mode():
        x = rows(device)
        compiled(x)
        module.scale = 3.0
        with counters.expect(recaptures=1):
            assert torch.equal(compiled(x)["out"], torch.relu(module.linear(x)) * 3)
    strict = recorded(device, Layer(), {**CONFIG, "on_state_change": "error"})
    strict.original.scale = 5.0
    with (
        torch.inference_mode(),
        pytest.raises(onegraph.errors.StateChangedError, match=r"scale was 2.0, and now is 5.0"),
    ):
        strict(rows(device))


def test_a_function_and_tensors_beside_the_arguments(device: Device) -> None:
    table = torch.randn(16, device=device.name)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return x + table

    compiled = recorded(device, shifted)
    assert [use["name"] for use in compiled.explain().to_dict()["plan"]["memory"]] == ["table"]
    with torch.inference_mode():
        x, before = rows(device), table
        table.add_(1)
        assert torch.equal(compiled(x), x + table)
        table = torch.randn(16, device=device.name)
        with pytest.raises(RecordingError, match="table .weight.") as caught:
            compiled(x)
        assert caught.value.tensor == "table" and before is not table

    hidden = {"deep": [[torch.randn(16, device=device.name)]]}

    def reads_hidden(x: torch.Tensor) -> torch.Tensor:
        return x + hidden["deep"][0][0]

    with pytest.raises(RecordingError, match="nothing tells when it is replaced"):
        recorded(device, reads_hidden)


def test_what_cant_be_recorded_is_refused(device: Device) -> None:
    with pytest.raises(RecordingError, match="FULL at size 4 can't be recorded.*_local_scalar_dense") as caught:
        recorded(device, lambda x: x * x.sum().item())
    assert caught.value.where is not None and "test_uncompiled.py" in caught.value.where
    with pytest.raises(RecordingError, match="size 4 can't be recorded.*nonzero"):
        recorded(device, lambda x: x.nonzero())
    with pytest.raises(ConfigError, match="records pieces of one"):
        recorded(device, Layer(), {"mode": 0, "cudagraph_mode": "PIECEWISE"})


def test_gradients_are_not_kept(device: Device) -> None:
    compiled = recorded(device, Layer())
    with torch.enable_grad():
        assert not compiled(rows(device))["out"].requires_grad


log: list[int] = []


@onegraph.eager_break
def on_host(x: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
    """Work of the host that a recording can't repeat: it looks at values."""
    log.append(len(x))
    return x + (shift if float(x.sum()) > 0 else -shift)


class Broken(nn.Module):
    """Two layers with work of the host between and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.second(on_host(y)) + y
        return on_host(z, shift=3.0) * 2


def test_eager_breaks_run_between_the_graphs_of_a_replay(device: Device) -> None:
    module = Broken()
    compiled = recorded(device, module)
    assert len(device.cuda.captures) == 6  # three graphs of two sizes
    with torch.inference_mode():
        for size in (4, 1, 4, 1, 4):
            x = rows(device, size) + (size - 2)
            expected, log[:] = module(x), []
            with counters.expect(**{"replays:FULL": 1}):
                found = compiled(x)
            assert torch.equal(found, expected) and log == [size, size]
        slots = compiled.slots(4)
        address = compiled(**slots).data_ptr()
        assert compiled(**slots).data_ptr() == address


def test_the_first_recorded_call_does_everything_once(device: Device) -> None:
    module = Broken().to(device.name)
    compiled = onegraph.compile(module, config={"mode": 0, "cudagraph_mode": "FULL"})
    with torch.inference_mode():
        x = rows(device)
        compiled(x)  # is watched before, and then run
        expected, log[:] = module(x), []
        assert torch.equal(compiled.record(x), expected) and log == [4, 4]


def test_breaks_that_write_and_that_return_what_they_were_given(device: Device) -> None:
    @onegraph.eager_break
    def writes(y: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y.mul_(2 if bool(y[0, 0] > 0) else 3)
        cache.copy_(y.sum(0))
        return y, {"row": y[0], "cache": cache}

    class Writes(nn.Module):
        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x + 1
            same, others = writes(y, cache)
            return same + y, others["row"] * others["cache"]

    cache = torch.zeros(16, device=device.name)
    compiled = recorded(device, Writes(), cache=cache, dynamic={"cache": None})
    with torch.inference_mode():
        for _ in range(4):
            x = rows(device)
            expected = Writes()(x, cache)
            left = cache.clone()
            cache.zero_()
            with counters.expect(**{"replays:FULL": 1}):
                found = compiled(x, cache)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)) and torch.equal(cache, left)
        del cache, found, expected
        gc.collect()
        with pytest.raises(RecordingError, match="was freed"):
            compiled(rows(device), torch.zeros(16, device=device.name))


def test_a_break_with_results_of_another_size_is_an_error(device: Device) -> None:
    @onegraph.eager_break
    def positive(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]

    compiled = recorded(device, lambda x: positive(x) + 1)
    with torch.inference_mode():
        slots = compiled.slots(4)
        slots["x"].fill_(1.0)
        with pytest.raises(RecordingError, match=r"positive, an eager break, has returned \[64\] of torch.float32"):
            compiled(**slots)


def test_a_break_that_gives_python_values_is_refused(device: Device) -> None:
    @onegraph.eager_break
    def total(x: torch.Tensor) -> float:
        return float(x.sum())

    with pytest.raises(RecordingError, match="an eager break that returns a float"):
        recorded(device, lambda x: x * total(x))
    with pytest.raises(ConfigError, match="takes a Python function"):
        onegraph.eager_break(nn.Linear(2, 2))  # type: ignore[type-var]


def test_poisoned_memory_reaches_no_result_behind_a_break(device: Device) -> None:
    compiled = recorded(device, Broken(), {**CONFIG, "cudagraph_check": "always"})
    with torch.inference_mode():
        for size in (4, 1, 4):
            x = rows(device, size)
            found = compiled(x)
            assert torch.equal(found, compiled.original(x))


def test_where_nothing_is_recorded_a_break_is_a_plain_call(device: Device) -> None:
    module = Broken().to(device.name)
    with torch.inference_mode():
        x, log[:] = rows(device), []
        assert module(x).shape == (4, 16) and log == [4, 4]
        compiled = onegraph.compile(lambda x: torch.relu(plain(x)), config={"backend": "eager"})
        assert torch.equal(compiled(x), torch.relu(x + 1))


@onegraph.eager_break
def plain(x: torch.Tensor) -> torch.Tensor:
    return x + 1
