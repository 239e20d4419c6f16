"""Results that are views of an input which the call changes: they lie in the input, whatever its place and strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export import Dim

import onegraph

VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "first row": lambda x: x[:1],
    "last row": lambda x: x[x.shape[0] - 1 :],
    "transposed": lambda x: x.t(),
    "a column": lambda x: x.select(1, 2),
    "another dtype": lambda x: x.view(torch.int32)[1:],
    "two of them": lambda x: (x[1:], x[:, 1:3], x.sum()),
}


def places() -> dict[str, torch.Tensor]:
    """Tensors of five rows and four columns with different places in their memory."""
    memory = torch.arange(400.0)
    return {
        "whole": memory[:20].clone().view(5, 4),
        "offset": memory.clone()[24:44].view(5, 4),
        "with gaps": memory.clone()[8:].view(-1, 8)[:5, 2:6],
        "transposed": memory.clone()[8:28].view(4, 5).t(),
    }


@pytest.mark.parametrize("below_dynamo", [False, True], ids=["captured", "torch.compile"])
@pytest.mark.parametrize("view", VIEWS)
def test_they_lie_where_eager_has_them(view: str, below_dynamo: bool, fresh_cache: Any) -> None:
    def model(x: torch.Tensor) -> Any:
        x.add_(1)
        return VIEWS[view](x)

    for place in places():
        torch._dynamo.reset()
        compiled = (
            torch.compile(model, backend="onegraph", dynamic=True)
            if below_dynamo
            else onegraph.compile(model, dynamic_shapes={"x": {0: Dim("n", min=2, max=64)}})
        )
        for _ in range(3):
            ours, eagers = places()[place], places()[place]
            with torch.no_grad():
                found, wanted = compiled(ours), model(eagers)
                for one, other in zip(_tensors(found), _tensors(wanted), strict=True):
                    assert torch.equal(one, other)
                    assert one.stride() == other.stride() and one.storage_offset() == other.storage_offset()
                _tensors(found)[0].fill_(3)
                _tensors(wanted)[0].fill_(3)
            assert torch.equal(ours, eagers)


def test_equal_pieces_are_given_views_at_different_places(fresh_cache: Any) -> None:
    def model(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        for row in torch.relu(cache).unbind(0):
            x = torch.relu(x)
            row.add_(1)
            view = row[1:3]
            x = torch.relu(x) + view.sum(0)
        return x

    compiled = onegraph.compile(
        model, dynamic_shapes={"x": {0: Dim("n", min=1, max=8)}}, config={"splitting_ops": ["torch.relu"]}
    )
    for _ in range(3):
        x, cache = torch.randn(5, 4), torch.randn(2, 8, 4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, cache.clone()), model(x, cache.clone()))


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
