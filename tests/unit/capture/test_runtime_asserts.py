"""Assertions on declared sizes are judged once and leave the graph; those on sizes that depend on data stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export import Dim

import onegraph
from onegraph.capture import capture as capture_stage
from onegraph.capture.runtime_asserts import drop_judged_asserts

NUM_TOKENS = Dim("num_tokens", min=1, max=64)


def compiled_and_graph(function: Callable[..., Any], *arguments: torch.Tensor) -> tuple[Any, list[str]]:
    """The compiled function, and the targets of its graph's calls."""
    graphs: list[torch.fx.GraphModule] = []

    def keeping(graph_module: torch.fx.GraphModule, symbols: dict[str, str]) -> int:
        graphs.append(graph_module)
        return drop_judged_asserts(graph_module, symbols)

    names = function.__code__.co_varnames[: len(arguments)]
    shapes = {name: {0: NUM_TOKENS} for name in names}
    compiled = onegraph.compile(function, dynamic_shapes=shapes, config={"backend": "eager"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_stage, "drop_judged_asserts", keeping)
        compiled(*arguments)
    return compiled, [str(node.target) for node in graphs[0].graph.nodes if node.op.startswith("call_")]


def test_declared_sizes_are_not_asserted_again() -> None:
    def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        torch._check(a.shape[0] < 1000)
        return a + b

    compiled, calls = compiled_and_graph(add, torch.ones(4, 2), torch.ones(4, 2))
    assert calls == ["<built-in function add>"]
    with pytest.raises(onegraph.errors.InputContractError, match="num_tokens"):
        compiled(torch.ones(4, 2), torch.ones(5, 2))


@pytest.mark.parametrize("equal", [True, False], ids=["equal to a declared size", "at least 2"])
def test_sizes_that_depend_on_data_are_asserted_on_every_call(equal: bool) -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        rows = torch.nonzero(x[:, 0])
        torch._check(rows.shape[0] == x.shape[0] if equal else rows.shape[0] >= 2)
        return rows + 1

    compiled, calls = compiled_and_graph(chosen, torch.ones(4, 2))
    assert "aten._assert_scalar.default" in calls
    assert compiled(torch.ones(3, 2)).flatten().tolist() == [1, 2, 3]
    with pytest.raises(RuntimeError, match="assertion failed"):
        compiled(torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
