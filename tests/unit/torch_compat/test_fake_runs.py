"""What fake_runs needs of torch: symbols with bounds, and runs that a trace doesn't notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from onegraph.torch_compat import fake_runs


@pytest.fixture
def traced() -> tuple[Any, Any]:
    """A fake tensor of sizes (s0, 4), with s0 in 2..32, and its shape environment."""
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    fake = mode.from_tensor(torch.ones(8, 4), symbolic_context=context)
    torch._check(fake.shape[0] <= 32)
    return fake, shape_env


def test_symbols_have_bounds(traced: tuple[Any, Any]) -> None:
    fake, _ = traced
    assert list(fake_runs.symbol_ranges(([fake], {"n": fake.shape[0] * 2})).values()) == [(2, 32)]
    assert fake_runs.symbol_ranges(torch.ones(3)) == {}


def test_a_run_takes_the_sizes_it_is_given_and_tells_the_trace_nothing(traced: tuple[Any, Any]) -> None:
    fake, shape_env = traced
    (symbol,) = fake_runs.symbol_ranges(fake)
    known = torch.ones(4)
    guards = len(shape_env.guards)

    def run(x: torch.Tensor, n: int) -> torch.Tensor:
        assert type(n) is int
        return (x + known)[: n // 2] if x.shape[0] > 10 else x.double()

    with fake.fake_mode:
        big = fake_runs.run_on_fakes(run, (fake,), {"n": fake.shape[0] * 2}, {symbol: 20})
        small = fake_runs.run_on_fakes(run, (fake,), {"n": fake.shape[0] * 2}, {symbol: 3})
    assert big.shape == (20, 4) and big.dtype == torch.float32 and big.device.type == "cpu"
    assert small.shape == (3, 4) and small.dtype == torch.float64
    assert len(shape_env.guards) == guards


def test_symbols_are_bound_to_what_they_stand_for(traced: tuple[Any, Any]) -> None:
    fake, _ = traced
    sizes: dict[Any, int] = {}
    assert fake_runs.known_size(fake.shape[0] + 1, sizes) is None
    fake_runs.bind_symbols(fake, torch.ones(7, 4), sizes)
    fake_runs.bind_symbols(fake.shape[0], 9, sizes)
    assert fake_runs.known_size(fake.shape[0] + 1, sizes) == 8 and fake_runs.known_size(4, sizes) == 4
