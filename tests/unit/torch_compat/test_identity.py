"""What tracing decides by identity: each place where torch settles it without a guard is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from onegraph.torch_compat import dynamo
from onegraph.torch_compat.identity import Identities


class Mode:
    pass


MODE = Mode()


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mode = MODE
        self.left, self.right = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))


def decided(forward: Callable[..., torch.Tensor], *args: torch.Tensor) -> Identities:
    cls = type("Drawn", (Owner,), {"forward": forward})
    with dynamo.compile_scope("test"), torch.no_grad():
        return dynamo.capture(cls(), args, {}).identities


def test_one_object_at_a_local_and_a_global_place() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.mode is MODE else x + 1

    found = decided(forward, torch.ones(3))
    assert {frozenset((pair.left, pair.right)) for pair in found.same} == {frozenset(("G['MODE']", "L['self'].mode"))}
    assert found.same[0].user == f"{__file__}:{forward.__code__.co_firstlineno + 1}"
    assert found.compared == []


@pytest.mark.parametrize("how", ["is", "is not", "in a set", "as a key"])
def test_tensors_that_are_compared(how: str) -> None:
    def forward(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if how == "is":
            return x * 2 if x is y else self.left + x + y
        if how == "is not":
            return self.left + x if self.left is not self.right else x + y
        if how == "in a set":
            return x * len({x, y})
        return x * {x: 1, self.left: 2}[x] + y

    found = decided(forward, torch.ones(3), torch.ones(3))
    weights = {f"L['self']._parameters['{name}']" for name in ("left", "right")}
    expected = {
        "is": {"L['x']", "L['y']"},
        "is not": weights,
        "in a set": {"L['x']", "L['y']"},
        "as a key": {"L['x']", "L['self']._parameters['left']"},
    }
    assert {frozenset((pair.left, pair.right)) for pair in found.compared} == {frozenset(expected[how])}


def test_arithmetic_compares_nothing() -> None:
    def forward(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(x > y, x + self.left, y) if x is not None else y

    found = decided(forward, torch.ones(3), torch.ones(3))
    assert (found.same, found.compared) == ([], [])
