"""Dynamo's fold sites: each runs a call while tracing and keeps its result, and each is seen."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import operator
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from onegraph.ir.traced import FoldedCall
from onegraph.torch_compat import dynamo


@torch._dynamo.assume_constant_result  # type: ignore[attr-defined]
def table(index: int) -> int:
    return (3, 5, 7)[index]


class Marked(nn.Module):
    @torch._dynamo.assume_constant_result  # type: ignore[attr-defined]
    def scale(self) -> float:
        return 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale()


def level() -> int:
    return 4


@torch.compiler.substitute_in_graph(level, can_constant_fold_through=True)
def traced_level() -> int:
    return 5


def folds(function: Any) -> tuple[FoldedCall, ...]:
    with dynamo.compile_scope("test"), torch.no_grad():
        return dynamo.capture(function, (torch.ones(3, 2),), {}).folded


def asks_marked(x: torch.Tensor) -> torch.Tensor:
    return x * table(index=1)


def asks_torch(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if torch.is_autocast_enabled("cpu") else x + 1


def asks_sys(x: torch.Tensor) -> torch.Tensor:
    return x * sys.getrecursionlimit()


def asks_for_package(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if importlib.util.find_spec("no_such_package") is None else x


def asks_for_version(x: torch.Tensor) -> torch.Tensor:
    return x + len(importlib.metadata.version("torch"))


def asks_polyfilled(x: torch.Tensor) -> torch.Tensor:
    return x * level()


VERSION = importlib.metadata.version("torch")
SITES = [
    (asks_marked, "declared", table, (), {"index": 1}, 5),
    (asks_polyfilled, "declared", level, (), {}, 4),
    (asks_torch, "state", torch.is_autocast_enabled, ("cpu",), {}, False),
    (asks_sys, "state", sys.getrecursionlimit, (), {}, sys.getrecursionlimit),
    (asks_for_package, "installation", importlib.util.find_spec, ("no_such_package",), {}, None),
    (asks_for_version, "installation", importlib.metadata.version, ("torch",), {}, VERSION),
]


@pytest.mark.parametrize(
    ("function", "kind", "called", "args", "kwargs", "result"), SITES, ids=[site[0].__name__ for site in SITES]
)
def test_each_site_tells_the_call_its_result_and_the_users_line(
    function: Callable[..., Any], kind: str, called: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> None:
    (folded,) = folds(function)
    user = f"{__file__}:{function.__code__.co_firstlineno + 1}"
    result = result() if callable(result) else result  # other tests' libraries may have changed it since the import
    assert folded == FoldedCall(kind, called, args, kwargs, result, user)  # type: ignore[arg-type]


def test_a_marked_method_is_told_with_its_object() -> None:
    module = Marked()
    (folded,) = folds(module)
    assert (folded.kind, folded.result) == ("declared", 2.0)
    assert module in (getattr(folded.function, "__self__", None), *folded.args)


def test_what_follows_from_its_arguments_is_no_fold() -> None:
    def pure(x: torch.Tensor) -> torch.Tensor:
        scale = math.floor(2.5) + len(str(12)) + max(1, 2) + operator.index(2)
        if re.match(r"\d+", "12") and torch.promote_types(torch.int32, torch.float32).is_floating_point:
            scale += torch.finfo(torch.float32).bits + sum([1, 2])
        return x * scale

    assert folds(pure) == ()


def test_the_hooks_are_gone_after_the_trace() -> None:
    from torch._dynamo.variables import functions, nn_module
    from torch._dynamo.variables import torch as torch_variables

    sites = [
        lambda: functions.invoke_and_store_as_constant,
        lambda: nn_module.invoke_and_store_as_constant,
        lambda: functions.PolyfilledFunctionVariable.call_function,
        lambda: functions.SkipFunctionVariable.call_function,
        lambda: torch_variables.TorchInGraphFunctionVariable.call_function,
    ]
    before = [site() for site in sites]
    folds(asks_sys)
    assert [site() for site in sites] == before
