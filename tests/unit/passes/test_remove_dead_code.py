"""remove_dead_code: what nobody uses goes, unless it does something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from onegraph.passes.remove_dead_code import RemoveDeadCode
from tests.unit.passes.one_piece import calls, piece_of, rewritten


def x() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def test_a_chain_that_nobody_uses_goes() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        _ = F.silu(torch.cat((y.sin(), -y), -1)).view(-1)
        return y

    piece = piece_of(function, x(), unbacked=False)
    assert calls(piece) == [
        "y = exp(l_x_)",
        "sin = sin(y)",
        "neg = neg(y)",
        "cat = cat((sin, neg), -1)",
        "silu = silu(cat)",
        "_ = view(silu, -1)",
        "return y",
    ]
    after, (run,) = rewritten(piece, RemoveDeadCode())
    assert calls(after) == ["y = exp(l_x_)", "return y"]
    assert run.rewrites == 5


def test_own_ops_without_effect_go() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torch.ops.onegraph.grouped_linear(x, x.view(1, -1, 4), torch.zeros(6, dtype=torch.int64))
        return x.exp()

    after, _ = rewritten(piece_of(function, x(), unbacked=False), RemoveDeadCode())
    assert [call.partition(" = ")[2] for call in calls(after)[:-1]] == ["exp(l_x_)"]


@torch.library.custom_op("onegraph_tests::dead_code_counts", mutates_args=())
def counts(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@counts.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def changes(x: torch.Tensor) -> Any:
    y = x.exp()
    y.view(-1).add_(1)
    return y


def indexes(x: torch.Tensor) -> Any:
    y = x.exp()
    y[0] = 1
    return y


def draws(x: torch.Tensor) -> Any:
    torch.rand(3)
    return torch.randn_like(x)


def drops(x: torch.Tensor) -> Any:
    F.dropout(x, 0.5, training=True)
    return x.exp()


def asks(x: torch.Tensor) -> Any:
    torch.ops.onegraph_tests.dead_code_counts(x)
    return x.exp()


def asserts(x: torch.Tensor) -> Any:
    torch._assert_async((x.sum() < 1e9).all())
    return x.exp()


def normalises(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> Any:
    F.batch_norm(x, mean, var, training=True)
    return x.exp()


def looks_up(x: torch.Tensor, table: torch.Tensor) -> Any:
    F.embedding(x.long(), table, max_norm=0.1)
    return x.exp()


def writes_into(x: torch.Tensor, out: torch.Tensor) -> Any:
    torch.exp(x, out=out)
    return x.sin()


STAY: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], str]] = {
    "a change in place": (changes, (), "add_"),
    "a change by index": (indexes, (), "setitem"),
    "a random number": (draws, (), "rand("),
    "dropout": (drops, (), "dropout"),
    "an op of others": (asks, (), "dead_code_counts"),
    "an assert": (asserts, (), "assert"),
    "running statistics": (normalises, (torch.zeros(4), torch.ones(4)), "batch_norm"),
    "a table that is renormed": (looks_up, (torch.ones(4, 3),), "embedding"),
    "an out argument": (writes_into, (torch.ones(6, 4),), "exp"),
}


@pytest.mark.parametrize(("function", "more", "name"), STAY.values(), ids=STAY)
def test_what_does_something_stays(function: Callable[..., Any], more: tuple[torch.Tensor, ...], name: str) -> None:
    piece = piece_of(function, x().abs(), *more, unbacked=False)
    assert any(name in call for call in calls(piece))
    after, (run,) = rewritten(piece, RemoveDeadCode())
    assert run.rewrites == 0
    assert calls(after) == calls(piece)


def test_a_size_that_is_found_in_the_data_stays() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        (x > 0).nonzero()
        return x.exp()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        piece = piece_of(function, x(), unbacked=False)
    after, _ = rewritten(piece, RemoveDeadCode())
    assert any("nonzero" in call for call in calls(after))


def test_fuel_is_respected() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x.sin(), x.cos(), x.tan()
        return x.exp()

    _, (run,) = rewritten(piece_of(function, x()), RemoveDeadCode(), fuel=1)
    assert run.rewrites == 1
