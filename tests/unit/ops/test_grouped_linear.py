"""Each row through its own expert's weight, whatever the rows and experts are."""

from __future__ import annotations

import pytest
import torch

import onegraph.ops  # noqa: F401 - registers the ops


def draw(rows: int, experts: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(experts, 6, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, weight, torch.randint(experts, (rows,), generator=generator)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-1)], ids=str
)
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("experts", [1, 4, 50])
def test_each_row_meets_its_own_expert(rows: int, experts: int, dtype: torch.dtype, tolerance: float) -> None:
    x, weight, expert_ids = draw(rows, experts, dtype, rows * experts)
    out = torch.ops.onegraph.grouped_linear(x, weight, expert_ids)
    wanted = torch.stack([weight[e].double() @ row.double() for row, e in zip(x, expert_ids, strict=True)])
    assert out.dtype == dtype and out.shape == wanted.shape
    assert (out.double() - wanted).abs().max() < tolerance


def test_weights_may_be_transposed_views() -> None:
    x, weight, expert_ids = draw(7, 3, torch.float32, 0)
    view = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert not view.is_contiguous()
    assert torch.allclose(
        torch.ops.onegraph.grouped_linear(x, view, expert_ids),
        torch.ops.onegraph.grouped_linear(x, weight, expert_ids),
        atol=1e-6,
    )


def test_op_passes_torchs_own_check() -> None:
    torch.library.opcheck(
        torch.ops.onegraph.grouped_linear.default,
        draw(5, 3, torch.float32, 1),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
