"""What the audit says the compiler is handed: it tells apart what makes other code, and nothing else."""

from __future__ import annotations

import types

import pytest
import torch

from onegraph.torch_compat.compiler_input import switched, switches, written_graph, written_settings
from onegraph.torch_compat.inductor import portable_config

NO_SIZES = types.SimpleNamespace(var_to_range={}, deferred_runtime_asserts={}, guards=[])
"""The shape environment of a graph without symbols."""


def graph(constant: float, name: str = "x", held: torch.Tensor | None = None) -> torch.fx.GraphModule:
    root = torch.nn.Module()
    root.register_buffer("held", torch.ones(2) if held is None else held)
    made = torch.fx.Graph(root)
    x = made.placeholder(name)
    made.output((made.call_function(torch.add, (x, constant)), made.get_attr("held")))
    return torch.fx.GraphModule(root, made)


def written(graph_module: torch.fx.GraphModule, *inputs: torch.Tensor) -> str:
    return written_graph(graph_module, inputs, NO_SIZES)


def test_names_do_not_count_and_constants_do() -> None:
    x = torch.ones(2)
    assert written(graph(1.0), x) == written(graph(1.0, "y"), x)
    others = [graph(2.0), graph(1), graph(-0.0), graph(1.0, held=torch.zeros(2))]
    assert len({written(one, x) for one in (graph(1.0), *others)}) == 5


def test_inputs_are_told_apart_by_dtype_layout_and_shared_memory() -> None:
    base = torch.ones(8, 2)
    alike = [base[:2], torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2).T, base[1:3]]
    assert len({written(graph(1.0), one) for one in alike}) == 4
    assert written(graph(1.0), base[:2], base[2:4]) != written(graph(1.0), base[:2], torch.ones(8, 2)[2:4])


@pytest.mark.parametrize("name", ["size_asserts", "_use_fp64_for_unbacked_floats", "cpp.enable_unsafe_math_opt_flag"])
def test_an_option_is_in_what_is_written_and_in_the_key(name: str) -> None:
    before = written_settings({}, "cpu"), portable_config({})
    with switched(name, not switches()[name]):
        assert before[0] != written_settings({}, "cpu") and before[1] != portable_config({})
    assert before == (written_settings({}, "cpu"), portable_config({}))
