"""Outputs are laid out as eager lays them out, for every size: the next piece, other ops and the caller rely on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.export import Dim

import onegraph

ROWS = Dim("rows", min=1, max=32)


@torch.library.custom_op("layouts::sum_in_memory_order", mutates_args=())
def sum_in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """Reads memory in order, as C++ kernels do that are given contiguous tensors."""
    return x.as_strided(x.shape, (x.shape[1], 1)).sum(1)


@sum_in_memory_order.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0],))


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.relu().t().contiguous()


def heads(x: torch.Tensor) -> torch.Tensor:
    return (x.unflatten(1, (2, 2)) * 2).transpose(0, 1).contiguous()


def permuted(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x * 2, x + 1]).contiguous().permute(1, 2, 0)


def before_an_op(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.layouts.sum_in_memory_order(x.relu().t().contiguous()) * 2


def before_a_view(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = x.relu().t().contiguous()
    return torch.cos(z), torch.cos(z).view(-1) * 3


@pytest.mark.parametrize("sizes", [[], [8]], ids=["all sizes", "and one of its own"])
@pytest.mark.parametrize("function", [transposed, heads, permuted, before_an_op, before_a_view])
def test_strides_and_values_are_those_of_eager(
    function: Callable[..., object], sizes: list[int], fresh_cache: object
) -> None:
    splitting_ops = {before_an_op: ["layouts::sum_in_memory_order"], before_a_view: ["torch.cos"]}.get(function, [])
    config = {"splitting_ops": splitting_ops, "compile_sizes": sizes}
    for start in ("cold", "warm"):
        compiled = onegraph.compile(function, dynamic_shapes={"x": {0: ROWS}}, config=config)
        for rows in (3, 1, 8, 32):
            x = torch.randn(rows, 4)
            with torch.no_grad():
                expected, found = function(x), compiled(x)
            for one, other in zip(_tensors(expected), _tensors(found), strict=True):
                torch.testing.assert_close(one, other)
                assert one.contiguous().stride() == other.contiguous().stride()
                assert one.stride() == other.stride() or rows == 1, (start, rows)


def _tensors(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)  # type: ignore[call-overload]
