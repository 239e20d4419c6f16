"""The shortest call of an operator is a call of that operator, and finding it runs nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegraph.torch_compat.operator_calls import operator_call

ATEN = torch.ops.aten
X, WEIGHT, OUT = torch.randn(2, 3), torch.randn(3, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "function"),
    [
        (ATEN.mm.out, (X, WEIGHT), {"out": OUT}, torch.mm),
        (ATEN.add.out, (X, 1), {"alpha": 2, "out": OUT}, torch.add),
        (ATEN.cat.out, ([X[:1], X[1:]],), {"out": OUT}, torch.cat),
        (ATEN.copy_.default, (OUT, X), {}, torch.Tensor.copy_),
        (ATEN.silu.out, (X,), {"out": OUT}, torch._C._nn.silu),
        (ATEN.mul.Scalar, (X, 2), {}, ATEN.mul.Scalar),  # torch.mul takes a number for a tensor
        (ATEN.embedding.out, (WEIGHT, torch.tensor([1, 2])), {"out": OUT}, ATEN.embedding.out),
        (torch.ops.mkldnn._linear_pointwise.default, (X, WEIGHT, None, "none", [], ""), {}, None),
    ],
)
def test_it_is_torchs_function_where_that_reaches_the_operator(op: Any, args: Any, kwargs: Any, function: Any) -> None:
    OUT.zero_()
    call: Any = operator_call(op, args, kwargs)
    assert call.func == (function or op) and not OUT.any()
    expected = op(*args, **kwargs).clone()
    OUT.zero_()
    assert torch.equal(call(), expected)
