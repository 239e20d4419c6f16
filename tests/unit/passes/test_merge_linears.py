"""merge_linears: layers of one input become one, where nobody could tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch.nn import functional as F

from onegraph.ir.graph import WeightInput
from onegraph.ir.passes import Fuel
from onegraph.ir.piece import Piece, SplitGraph
from onegraph.passes.merge_linears import MergeLinears
from onegraph.passes.run import Passed, PassSettings, run_passes
from tests.unit.passes.one_piece import calls, piece_of

WEIGHTS = "abcd"
"""Names of arguments that are weights; `x` is none."""


def x() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def weight(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)).to(dtype)


def merged(piece: Piece, refuse: str | None = None, fuel: int | None = None, **options: Any) -> Passed:
    weights = {name: WeightInput(name, {}, name) for name in piece.inputs if name.removeprefix("l_")[:1] in WEIGHTS}
    settings = PassSettings(
        (MergeLinears(**options),),
        None,
        frozenset(),
        weights=weights,
        why_not=lambda sources: refuse,
        check=True,
        fuel=Fuel(fuel),
    )
    return run_passes(SplitGraph(cast(Any, None), (piece,), piece.outputs), settings)


def two(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
    return F.linear(x, a).sin(), F.linear(x, b).cos()


def test_two_become_one() -> None:
    piece = piece_of(two, x(), weight(3), weight(5), unbacked=False)
    passed = merged(piece)
    assert calls(passed.pieces[0]) == [
        "linear_2 = linear(l_x_, merged_l_a__l_b_, None)",
        "narrow = narrow(linear_2, -1, 0, 3)",
        "narrow_1 = narrow(linear_2, -1, 3, 5)",
        "sin = sin(narrow)",
        "cos = cos(narrow_1)",
        "return sin, cos",
    ]
    assert passed.pieces[0].inputs == ("l_x_", "merged_l_a__l_b_")
    assert [one.sources for one in passed.merged] == [("l_a_", "l_b_")]


def test_biases_are_merged_too() -> None:
    def function(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return F.linear(x, a, c).sin(), F.linear(input=x, weight=b, bias=d).cos()

    passed = merged(piece_of(function, x(), weight(3), weight(5), torch.ones(3), torch.zeros(5), unbacked=False))
    assert [one.sources for one in passed.merged] == [("l_a_", "l_b_"), ("l_c_", "l_d_")]
    assert passed.runs[0][0].rewrites == 1


def test_a_user_that_needs_contiguous_rows_gets_them() -> None:
    def function(x: Any, a: Any, b: Any) -> Any:
        return F.linear(x, a).view(-1).sin(), F.linear(x, b).cos()

    passed = merged(piece_of(function, x(), weight(3), weight(5), unbacked=False))
    assert "contiguous = contiguous(narrow)" in calls(passed.pieces[0])


def test_most_is_a_limit() -> None:
    def function(x: Any, a: Any, b: Any, c: Any) -> Any:
        return F.linear(x, a).sin(), F.linear(x, b).cos(), F.linear(x, c).exp()

    passed = merged(piece_of(function, x(), weight(3), weight(5), weight(7), unbacked=False), most=2)
    assert [one.sources for one in passed.merged] == [("l_a_", "l_b_")]


def changed_input(x: Any, a: Any, b: Any) -> Any:
    y = x + 1
    first = F.linear(y, a).sin()
    y.add_(1)
    return first, F.linear(y, b).cos()


def changed_weight(x: Any, a: Any, b: Any) -> Any:
    first = F.linear(x, a).sin()
    b.add_(1)
    return first, F.linear(x, b).cos()


TRAPS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], str | None]] = {
    "different inputs": (lambda x, a, b: (F.linear(x, a), F.linear(x.sin(), b)), (weight(3), weight(5)), None),
    "one layer": (lambda x, a: F.linear(x, a), (weight(3),), None),
    "one weight twice": (lambda x, a: (F.linear(x, a).sin(), F.linear(x, a).cos()), (weight(3),), "the same weight"),
    "a bias for one": (
        lambda x, a, b, c: (F.linear(x, a, c).sin(), F.linear(x, b).cos()),
        (weight(3), weight(5), torch.ones(3)),
        "a bias and others don't",
    ),
    "a computed weight": (lambda x, a, b: (F.linear(x, a), F.linear(x, b.sin())), (weight(3), weight(5)), None),
    "a changed input": (changed_input, (weight(3), weight(5)), "changed in place"),
    "a changed weight": (changed_weight, (weight(3), weight(5)), "changed in place"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_is_left_alone(name: str) -> None:
    function, weights, told = TRAPS[name]
    piece = piece_of(function, x(), *weights, unbacked=False)
    passed = merged(piece)
    (run,) = passed.runs[0]
    assert run.rewrites == 0
    assert passed.pieces[0] is piece
    assert not passed.merged
    assert [told in miss.why for miss in run.near_misses] == ([True] if told else [])


def test_weights_that_nobody_owns_stay_apart() -> None:
    passed = merged(piece_of(two, x(), weight(3), weight(5), unbacked=False), refuse="they are somebody else's")
    assert passed.runs[0][0].near_misses[0].why == "they are somebody else's"
    assert not passed.merged


def test_fuel_is_asked_for() -> None:
    assert not merged(piece_of(two, x(), weight(3), weight(5), unbacked=False), fuel=0).merged


def test_a_large_group_becomes_several() -> None:
    def function(x: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return F.linear(x, a).sin(), F.linear(x, b).cos(), F.linear(x, c).exp(), F.linear(x, d).tan()

    weights = (weight(3), weight(5), weight(7), weight(9))
    passed = merged(piece_of(function, x(), *weights, unbacked=False), most=2)
    assert [one.sources for one in passed.merged] == [("l_a_", "l_b_"), ("l_c_", "l_d_")]
    assert passed.runs[0][0].rewrites == 2
