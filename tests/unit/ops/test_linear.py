"""`onegraph::linear` as an op: the reference, shapes while tracing, the overload `out`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import onegraph.ops  # noqa: F401 - registers the ops
from onegraph.ops import library
from onegraph.ops.library import OutFunctions

X, WEIGHT, BIAS = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
EXPECTED = torch.nn.functional.linear(X, WEIGHT, BIAS)


def test_the_op_and_its_fake() -> None:
    assert torch.equal(torch.ops.onegraph.linear(X, WEIGHT, BIAS), EXPECTED)
    for x, bias in ((X, None), (X[0], BIAS), (X[:, :0], BIAS), (X.half(), None)):
        given = x, WEIGHT.to(x.dtype), bias
        torch.library.opcheck(torch.ops.onegraph.linear.default, given, test_utils=("test_schema", "test_faketensor"))


def test_out_of_the_op() -> None:
    memory = torch.zeros(2, 3, 5)
    assert torch.ops.onegraph.linear.out(X, WEIGHT, BIAS, out=memory) is memory
    assert torch.equal(memory, EXPECTED)


def test_compiled_code_calls_what_the_dispatcher_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory for the result, which it may leave aside; by the dispatcher while something listens there."""
    called: list[torch.Tensor | None] = []

    def implementation(x: Any, weight: Any, bias: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        called.append(out)
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setitem(library._implemented, ("linear", "CPU"), implementation)
    functions, memory = OutFunctions("CPU"), torch.zeros(2, 3, 5)
    assert functions.linear(X, WEIGHT, BIAS, out=memory) is memory
    assert torch.equal(memory, EXPECTED) and called == [memory]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functions.linear(X, WEIGHT, None, out=memory)
    assert torch.equal(memory, torch.nn.functional.linear(X, WEIGHT)) and len(called) == 1
    assert "onegraph::linear" in {event.name for event in profile.events()}


def test_without_kernels_compiled_code_calls_the_reference() -> None:
    memory = torch.zeros(2, 3, 5)
    assert OutFunctions("NoSuchKey").linear(X, WEIGHT, BIAS, out=memory) is memory
    assert torch.equal(memory, EXPECTED)
