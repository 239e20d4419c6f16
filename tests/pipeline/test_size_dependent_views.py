"""Results that are views at some sizes and copies at the others, and what is written into them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.errors import ConstraintError

Model = Callable[[torch.Tensor], torch.Tensor]


def written(copy: Model) -> Model:
    """Writes into the result, and then reads what it may be a view of."""

    def function(x: torch.Tensor) -> torch.Tensor:
        copy(x).add_(1)
        return x * 2

    return function


def source_written(copy: Model) -> Model:
    def function(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        y = copy(h)
        h.add_(1)
        return y

    return function


def other_view_written(copy: Model) -> Model:
    def function(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        copy(h).view(-1)[:1].zero_()
        return h

    return function


def in_place_by_name(x: torch.Tensor) -> torch.Tensor:
    x.t().contiguous().__iadd__(1)
    return x * 2


N, M = {"min": 1, "max": 6}, {"min": 1, "max": 5}
CASES: dict[str, tuple[Model, tuple[Any, ...], str]] = {
    "one row": (written(lambda x: x.t().contiguous()), (N, 4), "n != 1"),
    "reshape": (source_written(lambda x: x.t().reshape(-1)), (N, 4), "n != 1"),
    "flatten": (other_view_written(lambda x: x.t().flatten()), (N, 4), "n != 1"),
    "by name": (in_place_by_name, (N, 4), "n != 1"),
    "input by name": (written(lambda x: torch.reshape(input=x.t(), shape=(-1,))), (N, 4), "n != 1"),
    "a copy of a copy": (written(lambda x: x.t().contiguous().t().contiguous()), (N, 4), "n != 1"),
    "two sizes": (written(lambda x: x.permute(2, 0, 1).contiguous()), (N, M, 4), "(n != 1) or (m != 1)"),
    "an expression": (written(lambda x: x[1:].t().contiguous()), ({"min": 2, "max": 6}, 8), "n != 2"),
    "all columns": (written(lambda x: x[:, :4].contiguous()), (3, {"min": 4, "max": 8}), "m != 4"),
    "all columns merged": (written(lambda x: x[:, :4].reshape(-1)), (3, {"min": 4, "max": 8}), "m != 4"),
    "channels last": (
        written(lambda x: x.contiguous(memory_format=torch.channels_last)), (2, {"min": 1, "max": 3}, 4, 4), "m != 1"
    ),
}  # fmt: skip


def dims_of(shape: tuple[Any, ...]) -> dict[int, Dim]:
    return {i: Dim("nmk"[i], **size) for i, size in enumerate(shape) if isinstance(size, dict)}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CASES)
def test_a_write_that_shows_the_view_is_a_condition_on_the_sizes(name: str, backend: str) -> None:
    function, shape, condition = CASES[name]
    ranges = [range(one["min"], one["max"] + 1) if isinstance(one, dict) else [one] for one in shape]
    largest = torch.randn([sizes[-1] for sizes in ranges])
    shapes = {"x": dims_of(shape)}
    with pytest.raises(ConstraintError) as caught:
        onegraph.compile(function, dynamic_shapes=shapes, config={"backend": backend})(largest)
    assert [entry.expr for entry in caught.value.constraints] == [condition]
    split = onegraph.compile(function, dynamic_shapes=shapes, config={"backend": backend, "on_constraint": "split"})
    for sizes in itertools.product(*ranges):
        x = torch.randn(sizes)
        given, expected = x.clone(), x.clone()
        torch.testing.assert_close(split(given), function(expected))
        torch.testing.assert_close(given, expected)


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept[:, : x.shape[0]].contiguous().add_(1)
        return x + self.kept.sum()


def test_a_view_of_a_buffer_is_one_too() -> None:
    shapes = {"x": {0: Dim("n", min=2, max=8)}}
    with pytest.raises(ConstraintError, match="n != 8"):
        onegraph.compile(Cache(), dynamic_shapes=shapes, config={"backend": "aot_eager"})(torch.ones(3))
    module, reference = Cache(), Cache()
    compiled = onegraph.compile(
        module, dynamic_shapes={"x": {0: Dim("n", min=2, max=7)}}, config={"backend": "aot_eager"}
    )
    for size in (2, 7, 5):
        torch.testing.assert_close(compiled(torch.ones(size)), reference(torch.ones(size)))
    assert module.kept.equal(reference.kept)


FINE: dict[str, Model] = {
    "nobody looks": lambda x: (x * 2).t().contiguous().add_(1),
    "nothing is written": lambda x: x.t().contiguous() * 1,
    "the source is gone": lambda x: (x * 2).t().flatten().mul_(3),
    "one of two copies is one": lambda x: x.t().contiguous().clone().add_(1) + x.sum(),
    "rows left out": lambda x: x[2:].t().contiguous() * 1,
    "rows left out and written": lambda x: (x[:-2] * 1).t().reshape(-1).add_(1),
    "a copy at every size": lambda x: x.expand(2, *x.shape).reshape(-1).add_(1) + x.sum(),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", FINE)
def test_where_the_view_does_not_show_there_is_no_condition(name: str, backend: str) -> None:
    function = FINE[name]
    compiled = onegraph.compile(
        function, dynamic_shapes={"x": {0: Dim("n", min=3, max=64)}}, config={"backend": backend}
    )
    for size in (5, 3, 64):
        x = torch.randn(size, 4)
        torch.testing.assert_close(compiled(x), function(x))
