"""The oracle's judgement: how far compiled is from the truth, measured by how far eager is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onegraph.numerics.compare import FACTOR, ROUNDINGS, compare, uninitialised
from onegraph.numerics.oracle import check_call
from onegraph.torch_compat.op_modes import FilledMemory, InFloat64

TRUTH = torch.linspace(-1, 1, 64, dtype=torch.float64)


def noisy(amount: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (TRUTH + amount * torch.cos(torch.arange(64.0).double() * 7)).to(dtype)


def test_compiled_nearer_to_the_truth_than_eager_is_in_order() -> None:
    found = compare(noisy(0), noisy(1e-2), TRUTH)
    assert found.ok and found.max_error < found.eager_error


def test_compiled_as_far_as_eager_times_the_factor_is_in_order_and_further_is_not() -> None:
    assert compare(noisy(1e-3 * FACTOR * 0.9), noisy(1e-3), TRUTH).ok
    found = compare(noisy(1e-3 * FACTOR * 1.2), noisy(1e-3), TRUTH)
    assert not found.ok
    assert found.where is not None and "compiled" in found.where and "reference" in found.where


def test_one_wrong_element_of_many_is_seen() -> None:
    wrong = TRUTH.float()
    wrong[17] += 1e-3
    found = compare({"a": [wrong]}, {"a": [TRUTH.float()]}, {"a": [TRUTH]})
    assert not found.ok
    assert found.where is not None and "['a'][0][17]" in found.where


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 2**16))
def test_rounding_once_is_in_order_for_every_dtype(dtype: torch.dtype, seed: int) -> None:
    truth = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 100
    assert compare(truth.to(dtype), truth.to(dtype), truth).ok
    assert not compare((truth * (1 + 4 * ROUNDINGS * torch.finfo(dtype).eps)).to(dtype), truth.to(dtype), truth).ok


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_must_stand_where_eager_has_them(value: float) -> None:
    special = TRUTH.float()
    special[3] = value
    truth = special.double()
    assert compare(special, special, truth).ok
    assert not compare(TRUTH.float(), special, truth).ok
    assert not compare(special, TRUTH.float(), TRUTH).ok
    assert not compare(-special, special, truth).ok


@pytest.mark.parametrize(
    ("compiled", "eager"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2).double()),
        (3, 4),
        (None, 1),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)]),
    ],
)
def test_what_must_be_equal_is_compared_exactly(compiled: Any, eager: Any) -> None:
    assert not compare(compiled, eager, eager).ok
    assert compare(eager, eager, eager).ok


def test_a_function_that_returns_memory_nobody_wrote_is_judged_by_the_rest() -> None:
    def partial(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(8)
        out[:4] = x.sum()
        return out

    assert check_call(partial, partial, (torch.ones(3),), {}).ok

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return partial(x) + 1

    assert not check_call(wrong, partial, (torch.ones(3),), {}).ok


def test_masks_come_from_two_fills() -> None:
    with FilledMemory(1.0):
        first = torch.empty(3)
    with FilledMemory(-3.0):
        second = torch.empty(3)
    assert uninitialised([first, torch.ones(1), 5], [second, torch.ones(1), 5])[0].all()


def test_the_reference_is_in_fp64_through_every_operator() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32))
    x = torch.randn(16, 32)
    with torch.no_grad(), InFloat64():
        found = module(x)
    expected = module.double()(x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_operator_that_writes_keeps_its_tensor_in_fp64_runs() -> None:
    def writes(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache.view(-1)[2:4] = x * 2
        cache.add_(1)
        return cache.sum()

    cache = torch.zeros(2, 3)
    with InFloat64():
        total = writes(torch.ones(2), cache)
    assert cache.tolist() == [[1, 1, 3], [3, 1, 1]] and float(total) == 10


def test_a_check_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("total", torch.zeros(1))
            self.total: torch.Tensor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.total.add_(1)
            x.add_(1)
            return x + torch.rand(1)

    module, x = Counting(), torch.zeros(2)
    state = torch.get_rng_state()
    assert check_call(module, module, (x,), {}).ok
    assert module.calls == 0 and module.total.item() == 0 and x.sum() == 0
    assert torch.equal(state, torch.get_rng_state())


def test_a_written_argument_is_compared_too() -> None:
    def eager(x: torch.Tensor) -> int:
        x.add_(1)
        return 0

    assert check_call(eager, eager, (torch.zeros(2),), {}).ok
    assert not check_call(lambda x: 0, eager, (torch.zeros(2),), {}).ok
