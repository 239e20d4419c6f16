"""What Dynamo's guards are read for: their expressions, kinds and user lines."""

from __future__ import annotations

import torch
from torch import nn

from onegraph.torch_compat import dynamo
from onegraph.torch_compat.guards import expression_scope

SCALE = 2.0


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = 0.5
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.alpha * SCALE


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "late"):
            x = x + 1
        return self.inner(x) if torch.is_grad_enabled() else -self.inner(x)


def test_each_read_of_state_is_a_guard_with_its_expression_and_user_line() -> None:
    with dynamo.compile_scope("test"), torch.no_grad():
        raw = dynamo.capture(Outer(), (torch.ones(3, 2),), {})
    facts = {(fact.name, fact.kind): fact for fact in raw.guards}
    line = Inner.forward.__code__.co_firstlineno + 1
    inner = "L['self']._modules['inner']"
    for name, kind in (
        (f"{inner}.alpha", "CONSTANT_MATCH"),
        ("G['SCALE']", "CONSTANT_MATCH"),
        (f"{inner}._modules['linear']._parameters['weight']", "TENSOR_MATCH"),
        (f"{inner}._modules['linear']._forward_hooks", "EMPTY_NN_MODULE_HOOKS_DICT"),
    ):
        assert (name, kind) in facts, sorted(facts)
    assert facts[f"{inner}.alpha", "CONSTANT_MATCH"].user == f"{__file__}:{line}"
    assert facts[f"{inner}._modules['linear']._parameters['weight']", "TENSOR_MATCH"].user == f"{__file__}:{line}"
    assert facts["L['self']", "HASATTR"].keywords == {"attr": "late"}
    assert facts["", "GRAD_MODE"].user is not None
    assert raw.globals_read["SCALE"] == 2.0
    assert Inner.forward.__code__ in raw.traced_code


def test_functions_in_guard_expressions_are_known_by_name() -> None:
    assert expression_scope()["___tuple_iterator_len"] is not None
