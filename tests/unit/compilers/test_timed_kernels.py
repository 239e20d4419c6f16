"""Kernels of a piece's Python: which nodes each call computes, and timers that come and go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from onegraph.compilers.timed_kernels import CallSite, call_sites, timed_kernels
from onegraph.ir.artifact import PieceSource
from onegraph.ir.step_clock import StepClock

WRAPPER = """
import torch
cpp_fused_add_0 = kernels['kernel_1']
triton_mul_1 = kernels['kernel_2']

def helper(x):
    cpp_fused_add_0(x)

class Runner:
    def call(self, args):
        x, weight = args
        args.clear()
        # Topologically Sorted Source Nodes: [a, b], Original ATen: [aten.add]
        buf0 = empty(x)
        cpp_fused_add_0(x, buf0)
        with torch.no_grad():
            # Topologically Sorted Source Nodes: [mul], Original ATen: [aten.mul]
            stream0 = 0
            triton_mul_1.run(buf0, 3, stream=stream0)
        cpp_fused_add_0(buf0, buf0)
        # Topologically Sorted Source Nodes: [a, b, linear], Original ATen: [aten.addmm]
        own_ops.linear(buf0, weight, None, out=buf0)
        # Unsorted Source Nodes: [top], Original ATen: [aten.topk]
        buf3 = torch.ops.aten.neg.default(buf0)
        return (buf3,)

call = Runner().call
"""


def made() -> tuple[PieceSource, list[str]]:
    called: list[str] = []

    def kernel(name: str) -> Any:
        return lambda *args, **kwargs: called.append(name)

    names: dict[str, Any] = {
        "kernels": {"kernel_1": kernel("add"), "kernel_2": SimpleNamespace(run=kernel("mul"))},
        "own_ops": SimpleNamespace(linear=kernel("linear")),
        "empty": torch.empty_like,
    }
    exec(WRAPPER, names)
    return PieceSource(WRAPPER, names), called


def test_each_call_has_the_nodes_above_it_and_an_operator_those_that_no_kernel_had() -> None:
    source, _ = made()
    assert call_sites(source) == (
        CallSite("cpp_fused_add_0", ("a", "b")),
        CallSite("triton_mul_1", ("mul",)),
        CallSite("cpp_fused_add_0", ()),
        CallSite("own_ops.linear", ("linear",)),
        CallSite("torch.ops.aten.neg.default", ("top",)),
    )


def test_sites_of_own_ops_and_of_texts_without_kernels() -> None:
    text = "def run(results, args):\n    x, = args\n    out = __paged_attention(x, out=results[0])\n    return [out]\n"
    assert call_sites(PieceSource(text, {})) == (CallSite("__paged_attention", ("out",)),)
    assert call_sites(PieceSource("x = 1\n", {})) == ()


def test_calls_are_spans_and_run_what_they_ran() -> None:
    source, called = made()
    before, clock = dict(source.names), StepClock()
    with timed_kernels([source, source], clock), clock.step():
        (result,) = source.names["call"]([torch.ones(2), torch.ones(3, 2)])
    assert result.shape == (2,)
    assert called == ["add", "mul", "add", "linear"]
    assert source.names == before
    step = clock.top.inside["step"]
    assert {name: span.num_calls for name, span in step.inside.items()} == {
        "cpp_fused_add_0": 2,
        "triton_mul_1": 1,
        "onegraph::linear 2 to 3": 1,
        "torch.ops.aten.neg.default": 1,
    }
    sites = call_sites(source)
    for span in step.inside.values():
        assert all(sites[site.number].called == site.called for site in span.sites)
    source.names["call"]([torch.ones(2), torch.ones(3, 2)])
    assert sum(span.num_calls for span in step.inside.values()) == 5
