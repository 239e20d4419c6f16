"""remove_no_ops: what goes, and what looks like it and has to stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from onegraph.ir.fx_nodes import called, storage_of
from onegraph.passes.remove_no_ops import RemoveNoOps
from tests.unit.passes.one_piece import calls, piece_of, rewritten

T = 6


def x(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(T, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


GO: dict[str, Callable[[torch.Tensor], Any]] = {
    "a cast to its own dtype": lambda x: x.exp().to(x.dtype).sin(),
    "a cast to its own dtype by type_as": lambda x: x.exp().type_as(x).sin(),
    "contiguous": lambda x: x.exp().contiguous().sin(),
    "the same shape": lambda x: x.exp().view(-1, 4, 8).sin(),
    "reshape to the same shape": lambda x: x.exp().reshape(x.shape[0], 4, 8).sin(),
    "times one": lambda x: (x.exp() * 1.0).sin(),
    "one times": lambda x: (1 * x.exp()).sin(),
    "over one": lambda x: (x.exp() / 1).sin(),
    "minus zero": lambda x: (x.exp() - 0.0).sin(),
    "dropout that drops nothing": lambda x: F.dropout(x.exp(), 0.5, training=False).sin(),
    "wider and back": lambda x: x.exp().float().to(x.dtype).sin(),
    "transposed twice": lambda x: x.exp().transpose(0, 1).transpose(0, 1).sin(),
    "unsqueezed and indexed": lambda x: x.exp().unsqueeze(0)[0].sin(),
    "all columns": lambda x: x.exp()[..., :8].sin(),
    "clone": lambda x: x.exp().clone().sin(),
}


@pytest.mark.parametrize("function", GO.values(), ids=GO)
def test_what_gives_what_it_was_given_goes(function: Callable[..., Any]) -> None:
    after, (run,) = rewritten(piece_of(function, x()), RemoveNoOps())
    assert run.rewrites == 1
    assert calls(after)[-2].startswith("sin = sin(exp)")


def test_a_call_that_logs_goes() -> None:
    layer = torch.nn.Linear(8, 8, dtype=torch.bfloat16)

    def function(x: torch.Tensor) -> torch.Tensor:
        torch._C._log_api_usage_once("python.nn_module")
        return layer(x)

    after, (run,) = rewritten(piece_of(function, x()), RemoveNoOps())
    assert run.rewrites == 1
    assert not any("log_api" in call for call in calls(after))


def changed_later(x: torch.Tensor) -> Any:
    y = x.exp()
    z = y * 1.0
    y.add_(1)
    return z.sin()


def turned_in_place(x: torch.Tensor) -> Any:
    y = x.exp()
    z = y.view(-1, 4, 8)
    y.transpose_(0, 1)
    return z.sin()


STAY: dict[str, tuple[Callable[..., Any], torch.dtype]] = {
    "plus zero makes 0.0 of -0.0": (lambda x: (x.exp() + 0.0).sin(), torch.float32),
    "minus -0.0 is plus 0.0": (lambda x: (x.exp() - (-0.0)).sin(), torch.float32),
    "times minus one": (lambda x: (x.exp() * -1.0).sin(), torch.float32),
    "whole numbers become floats": (lambda x: ((x > 0).long() * 1.0).sin(), torch.float32),
    "bools become whole numbers": (lambda x: ((x > 0) * 1).cumsum(0), torch.float32),
    "division of whole numbers": (lambda x: ((x > 0).long() / 1).sin(), torch.float32),
    "division that rounds": (lambda x: torch.div(x.exp(), 1, rounding_mode="floor").sin(), torch.float32),
    "a narrower cast rounds": (lambda x: x.exp().bfloat16().float().sin(), torch.float32),
    "fp16 has no room for bf16": (lambda x: x.exp().half().bfloat16().sin(), torch.bfloat16),
    "contiguous copies": (lambda x: x.exp().transpose(0, 1).contiguous().sin(), torch.float32),
    "other columns": (lambda x: x.exp()[..., :7].sin(), torch.float32),
    "a new tensor is returned beside the old one": (lambda x: (y := x.exp(), y * 1.0), torch.float32),
    "a new tensor is returned, the input isn't": (lambda x: x * 1.0, torch.float32),
    "a view of a new tensor is returned": (lambda x: (x * 1.0).transpose(0, 1), torch.float32),
    "a clone is returned": (lambda x: x.clone(), torch.float32),
    "the other one is changed in place": (changed_later, torch.float32),
    "a layout is changed in place": (turned_in_place, torch.float32),
    "a view is returned beside its base": (lambda x: (y := x.exp(), y.view(-1, 4, 8)), torch.float32),
    "dropout that drops": (lambda x: F.dropout(x.exp(), 0.5, training=True).sin(), torch.float32),
    "complex numbers, where infinity times 1 + 0j has a NaN": (
        lambda x: torch.view_as_real(torch.complex(x.exp(), x) * 1.0).sin(),
        torch.float32,
    ),
}


@pytest.mark.parametrize(("function", "dtype"), STAY.values(), ids=STAY)
def test_what_only_looks_like_it_stays(function: Callable[..., Any], dtype: torch.dtype) -> None:
    piece = piece_of(function, x(dtype))
    after, (run,) = rewritten(piece, RemoveNoOps())
    assert run.rewrites == 0
    assert calls(after) == calls(piece)


def test_a_view_of_what_went_shows_the_memory_of_what_stayed() -> None:
    """Else a later pass would take it for memory of its own."""

    def function(x: torch.Tensor) -> Any:
        y = x.exp()
        return (y * 1.0).transpose(0, 1).unsqueeze(0), x.sum()

    after, (run,) = rewritten(piece_of(function, x()), RemoveNoOps())
    assert run.rewrites == 1
    nodes = {node.name: node for node in after.graph_module.graph.nodes}
    (result, _) = nodes["output"].args[0]
    assert called(result) == "unsqueeze"
    assert storage_of(result) == storage_of(nodes["y"])


def test_fuel_is_respected() -> None:
    piece = piece_of(lambda x: (x.exp() * 1.0 * 1.0 * 1.0).sin(), x())
    _, (run,) = rewritten(piece, RemoveNoOps(), fuel=2)
    assert run.rewrites == 2


def test_nan_infinity_and_negative_zero_stay_as_they_are() -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40]).repeat(T, 1)
    piece = piece_of(lambda x: (x.neg() * 1.0 / 1 - 0.0).double().float().abs().neg(), special)
    after, (run,) = rewritten(piece, RemoveNoOps())
    assert run.rewrites == 4
    given = [T if not isinstance(value, torch.Tensor) else special for value in piece.fake_inputs]
    (found,), (wanted,) = after.graph_module(*given), piece.graph_module(*given)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
