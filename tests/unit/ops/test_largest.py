"""`onegraph::largest`: the CPU's kernel, its reference, and what PyTorch says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from onegraph.ops.largest import largest as reference
from onegraph.ops.library import implementation

pytestmark = pytest.mark.usefixtures("op_kernels")


def kernel() -> Callable[..., Any]:
    found = implementation("largest", "CPU")
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 49152), (3, 63), (2, 64), (5, 65), (64, 1000), (0, 7)])
def test_kernel_and_reference_find_the_largest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for find in (kernel(), reference, torch.ops.onegraph.largest):
        values, indices = find(x)
        assert torch.equal(values, x.amax(-1))
        assert torch.equal(x.gather(1, indices[:, None])[:, 0], values)
        assert (values.dtype, indices.dtype) == (dtype, torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [(0, 1), (3, 70), (64, 65), (128, 129), (15, 16, 17), (131,)])
def test_the_first_of_equal_ones_counts(places: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.zeros(2, 132, dtype=dtype)
    x[:, places] = 1
    for find in (kernel(), reference):
        assert find(x)[1].tolist() == [places[0]] * 2


@pytest.mark.parametrize("at", [0, 63, 64, 130])
def test_nan_is_larger_than_infinity(at: int) -> None:
    x = torch.zeros(3, 131)
    x[1, at] = x[1, 130] = torch.nan
    x[:, 5] = torch.inf
    for find in (kernel(), reference):
        values, indices = find(x)
        assert indices.tolist() == [5, min(at, 5) if at == 5 else at, 5]
        assert values.isnan().tolist() == [False, True, False]


def test_rows_of_negative_infinity() -> None:
    for width in (5, 64, 200):
        for find in (kernel(), reference):
            values, indices = find(torch.full((2, width), -torch.inf))
            assert indices.tolist() == [0, 0]
            assert values.isinf().all()


def test_rows_of_a_wider_tensor() -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))[:, 50:250]
    assert torch.equal(kernel()(x)[1], x.argmax(-1))
